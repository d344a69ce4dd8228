"""Queries, keys and values that come from one matrix, through a short convolution, in heads: the plumbing that linear
mixers share. Each mixer's own file has its gates, its recurrence and its norm.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.axes import positive
from models.conv import ShortConv, short_conv
from models.linear import Linear
from models.mixers.heads import head_dim
from models.mixers.inheritance import HeadShape, SoftmaxWeights, expand
from models.sequence import Sequence
from models.width import Units, split


class QKVMixer(nn.Module):
    """The base of a mixer that projects with `qkv` and `conv`; it adds `norm` and `out` itself.

    dim: the model's width. expand_k, expand_v: widths of the keys and of the values of all heads together, in multiples
    of dim. value_heads: null for `heads`; else each head of keys serves `shared_by` heads of values. writes: how many
    keys and values a token has in each head. conv, conv_bias: the short causal convolution, whose result passes silu;
    null for none. silu: whether silu stays without one.

    INHERITS: whether the mixer may begin from softmax attention's weights (`models.mixers.inheritance`).

    Raises ValueError for widths that the heads do not divide.
    """

    INHERITS: ClassVar[bool] = False
    norm: nn.Module
    out: nn.Module

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        expand_k: float,
        expand_v: float,
        value_heads: int | None = None,
        writes: int = 1,
        conv: int | None = None,
        conv_bias: bool = False,
        silu: bool = False,
    ):
        super().__init__()
        positive(dim=dim)
        self.units: Units = {"heads": heads}
        self.keys, self.values = keys, values = int(dim * expand_k), int(dim * expand_v)
        self.key_dim = head_dim(keys, heads, what="dim * expand_k")
        if value_heads is None:
            value_heads = heads
            head_dim(values, heads, what="dim * expand_v")
        elif value_heads < 1 or value_heads % heads or values % value_heads:
            raise ValueError(
                f"value_heads={value_heads}: must be a multiple of heads={heads} and divide dim * expand_v={values}"
            )
        self.value_dim, self.value_heads = values // value_heads, value_heads
        self.shared_by = value_heads // heads
        self.widths = (keys, writes * keys, writes * values)
        parts = (keys, *writes * (keys,), *writes * (values,))
        self.qkv = Linear(dim, sum(self.widths), axes=("heads", "embed"), parts=parts)
        self.conv = short_conv(sum(self.widths), conv, bias=conv_bias, off=silu, parts=parts)

    def project(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> queries [B, T, H, K], keys [B, T, writes·H, K], values [B, T, writes·N, V], in x's dtype."""
        q, k, v = split(self.conv(self.qkv(x_BTD), seq, slot=slot), self.widths)
        q_BTHK, k_BTHK = (x.unflatten(-1, (-1, self.key_dim)) for x in (q, k))
        return q_BTHK, k_BTHK, v.unflatten(-1, (-1, self.value_dim))

    def output(self, o_BTNV: Tensor, gate: Tensor | None = None) -> Tensor:
        """out(norm(o)), the norm of each head gated by `gate` [B, T, N·V] where it has one: [B, T, D]."""
        gates = () if gate is None else (gate.unflatten(-1, (-1, self.value_dim)),)
        y: Tensor = self.out(self.norm(o_BTNV, *gates).flatten(-2))
        return y

    @classmethod
    def like(cls, shape: HeadShape) -> dict[str, Any]:
        return {"heads": shape.heads, "expand_k": expand(shape), "expand_v": expand(shape)}

    def inherited(self, softmax: SoftmaxWeights) -> dict[str, Tensor]:
        """The convolution begins as the present token alone, so that it changes nothing yet."""
        values = {"qkv.weight": torch.cat((softmax.q, softmax.k, softmax.v)), "out.weight": softmax.out}
        if isinstance(self.conv, ShortConv):
            values["conv.weight"] = torch.zeros(self.conv.weight.shape)
            values["conv.weight"][:, 0] = 1.0
        if softmax.gate is not None and isinstance(getattr(self, "gate", None), nn.Linear | Linear):
            values["gate.weight"] = softmax.gate
        return values
