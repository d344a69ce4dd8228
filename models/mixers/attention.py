"""Softmax attention with grouped queries (2305.13245) and rotary positions (2104.09864), over all of a document or a
window of it.

The norm of queries and keys is Qwen3's (2505.09388), or OLMo-2's (2501.00656) over the channels of all heads; the gate
on the output is Qwen3-Next's (2505.06708).
"""

import math
from typing import Any, Literal, get_args

from torch import Tensor, nn

from models.axes import constant, declare, positive
from models.linear import Linear
from models.mixers import heads as sizes
from models.mixers.inheritance import HeadShape, SoftmaxWeights
from models.norm import RMSNorm, checked
from models.positions import Positions, RoPE
from models.sequence import Sequence
from models.width import Units

ROPE = RoPE()
NormHeads = Literal["each", "all"]

WIDEST = 1 << 16  # of a head: positions are worked out for half as many frequencies


class Attention(nn.Module):
    """heads: query heads. kv_heads: heads of keys and values, each for heads / kv_heads query heads; must divide
    `heads`, null for as many. head_dim: channels of a head; null where the heads share out the model's `dim`.
    window: number of tokens that a query sees, itself included; null for the whole document. sinks: number of the
    document's first tokens that remain in sight beyond the window (LM-Infinite 2308.16137, StreamingLLM 2309.17453).
    qk_norm: true normalises queries and keys before they are rotated. norm_heads: each normalises every head by itself,
    all the channels of all heads together. gate: true multiplies each channel of the output by a sigmoid of the input.
    qkv_bias: true adds a bias to queries, keys and values. out_bias: true adds one to the output. scale: factor of
    the scores; null for head_dim^-½. softcap: c that makes the scores s c·tanh(s / c), as in Gemma 2 (2408.00118); null
    for none. sink_logits: true gives each head a learnt score that takes part in every softmax and has no value, as in
    gpt-oss (2508.10925). positions: the rule by which a token's place in its document enters, of
    `models.positions`. norm_eps: epsilon that the norms of queries and keys add to the mean square.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        qk_norm: bool = False,
        norm_heads: NormHeads = "each",
        gate: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: bool = False,
        positions: Positions = ROPE,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        positive(dim=dim, heads=heads)
        self.head_dim = sizes.head_dim(dim, heads) if head_dim is None else head_dim
        positive(head_dim=self.head_dim, window=1 if window is None else window)
        if self.head_dim > WIDEST:
            raise ValueError(f"head_dim={self.head_dim}: must be at most {WIDEST:,}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads}: must divide heads={heads}")
        if sinks < 0 or sinks and window is None:
            raise ValueError(f"sinks={sinks}: must be 0 without a window, else at least 0")
        if norm_heads not in get_args(NormHeads):
            raise ValueError(f"norm_heads={norm_heads}: must be one of {', '.join(get_args(NormHeads))}")
        if norm_heads == "all" and not qk_norm:
            raise ValueError("norm_heads=all: must be each without qk_norm")
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"scale={scale}: must be above 0, or null for head_dim^-½")
        if softcap is not None and not 0 < softcap < math.inf:
            raise ValueError(f"softcap={softcap}: must be above 0, or null for none")
        positions.frequencies(self.head_dim)  # refuses a width that it cannot rotate
        self.window, self.sinks, self.positions = window, sinks, positions
        self.units: Units = {"heads": heads, "kv_heads": kv_heads}
        self.joint, self.factor = norm_heads == "all", None if scale is None else scale * self.head_dim**0.5
        width, kv_width = heads * self.head_dim, kv_heads * self.head_dim
        self.q = Linear(dim, width, axes=("heads", "embed"), bias=qkv_bias)
        self.kv = Linear(dim, 2 * kv_width, axes=("kv_heads", "embed"), parts=2 * (self.head_dim,), bias=qkv_bias)
        checked(norm_eps)
        if self.joint:
            self.q_norm: nn.Module = RMSNorm(width, eps=norm_eps, axis="heads")
            self.k_norm: nn.Module = RMSNorm(kv_width, eps=norm_eps, axis="kv_heads")
        else:
            self.q_norm = RMSNorm(self.head_dim, eps=norm_eps, axis=None) if qk_norm else nn.Identity()
            self.k_norm = RMSNorm(self.head_dim, eps=norm_eps, axis=None) if qk_norm else nn.Identity()
        self.softcap = softcap
        self.sink_logits = declare(heads, axes=("heads",), init=constant(0.0), decay=False) if sink_logits else None
        self.gate = Linear(dim, width, axes=("heads", "embed")) if gate else None
        self.out = Linear(width, dim, axes=("embed", "heads"), bias=out_bias)

    def _normed(self, norm: nn.Module, x_BTHK: Tensor) -> Tensor:
        y: Tensor = norm(x_BTHK.flatten(-2)).view_as(x_BTHK) if self.joint else norm(x_BTHK)
        return y

    def projections(self) -> SoftmaxWeights:
        """The weights that a linear mixer may begin from."""
        shape = HeadShape(self.q.weight.shape[1], self.units["heads"] or 1, self.head_dim)
        k, v = self.kv.weight.detach().unflatten(0, (-1, 2, self.head_dim)).unbind(1)
        k, v = (x.repeat_interleave(shape.heads // len(x), 0).flatten(0, 1) for x in (k, v))
        gate = None if self.gate is None else self.gate.weight.detach()
        return SoftmaxWeights(shape, self.q.weight.detach(), k, v, self.out.weight.detach(), gate)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK = self._normed(self.q_norm, self.q(x_BTD).unflatten(-1, (-1, self.head_dim)))
        k_BTGK, v_BTGK = self.kv(x_BTD).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        q_BTHK, k_BTGK = self.positions.turned(q_BTHK, self._normed(self.k_norm, k_BTGK), seq)
        if self.factor is not None:
            q_BTHK = q_BTHK * self.factor  # `attend` multiplies scores by head_dim^-½
        seen: dict[str, Any] = {"window": self.window, "sinks": self.sinks, "softcap": self.softcap}
        o_BTHK = seq.attend(q_BTHK, k_BTGK, v_BTGK, slot=slot, sink_logits=self.sink_logits, **seen)
        o_BTD = o_BTHK.flatten(-2)
        return self.out(o_BTD if self.gate is None else o_BTD * self.gate(x_BTD).sigmoid())
