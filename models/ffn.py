"""The dense feed-forward layers, all tokens at once or a tile of them at a time: SwiGLU (arXiv 2002.05202) and its
kind, two matrices with an activation between them, and RWKV's, which sees the token before as well."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.axes import constant, declare, positive, uniform
from models.cross_layer import ALONE, Depth
from models.kernels.swiglu import swiglu
from models.linear import Linear
from models.recompute import unkept
from models.sequence import Sequence
from models.token_shift import orthogonal, previous, ramp


def tiled(f: Callable[[Tensor], Tensor], x: Tensor, tile: int | None) -> Tensor:
    """f(x) for an `f` that treats each token by itself, `tile` of them at a time (None: all); x [..., D] -> [..., O].

    Of a tile only the input is kept, and `f` runs again in its backward pass: what `f` holds inside is that of one
    tile, however long the sequence (tiled MLP, Arctic long sequence training, 2506.13996).
    """
    if tile is None:
        return f(x)
    tiles = x.flatten(0, -2).split(tile)
    again = partial(checkpoint, partial(unkept, f), use_reentrant=False, preserve_rng_state=False)
    y = torch.cat([again(x_ND) for x_ND in tiles])
    return y.view(*x.shape[:-1], -1)


def relu2(x: Tensor) -> Tensor:
    """relu(x)², of Primer (2109.08668)."""
    return F.relu(x).square()


def clamped_swiglu(gate: Tensor, up: Tensor, *, limit: float = 7.0, sharpness: float = 1.702) -> Tensor:
    """(u + 1) g σ(1.702 g) with g at most 7 and u within ±7: gpt-oss's SwiGLU (2508.10925)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(sharpness * gate)


ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu2,
}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The function of this name. Raises ValueError for another."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name}: must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class SwiGLU(nn.Module):
    """(silu(x W1) ⊙ x W3) W2. hidden: columns of W1 and of W3. activation: of x W1; silu is SwiGLU itself, gelu and
    gelu_tanh GeGLU. bias: true adds one to each of the products.

    x [..., D] -> [..., D]; of the attribute `tile` tokens at a time, unless it is None.
    """

    def __init__(self, *, dim: int, hidden: int, activation: ActivationName = "silu", bias: bool = False):
        super().__init__()
        positive(dim=dim, hidden=hidden)
        self.activation = activation_of(activation)
        self.tile: int | None = None
        self.gate_up = Linear(dim, 2 * hidden, axes=("ffn", "embed"), parts=(hidden, hidden), bias=bias)
        self.down = Linear(hidden, dim, axes=("embed", "ffn"), bias=bias)

    def transform(self, x: Tensor) -> Tensor:
        return tiled(self._gated, x, self.tile)

    def _gated(self, x: Tensor) -> Tensor:
        inner = self.gate_up(x)
        if self.activation is F.silu:
            return self.down(swiglu(inner))
        gate, up = inner.chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, None]:
        return self.transform(x_BTD), None


class MLP(nn.Module):
    """a(x W1) W2. hidden: columns of W1. activation: a; relu2 is relu(x)². bias: true adds one to each of the products.

    x [..., D] -> [..., D]; of the attribute `tile` tokens at a time, unless it is None.
    """

    def __init__(self, *, dim: int, hidden: int, activation: ActivationName = "relu2", bias: bool = False):
        super().__init__()
        positive(dim=dim, hidden=hidden)
        self.activation = activation_of(activation)
        self.tile: int | None = None
        self.up = Linear(dim, hidden, axes=("ffn", "embed"), bias=bias)
        self.down = Linear(hidden, dim, axes=("embed", "ffn"), bias=bias)

    def transform(self, x: Tensor) -> Tensor:
        return tiled(self._activated, x, self.tile)

    def _activated(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.activation(self.up(x)))
        return y

    def forward(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, None]:
        return self.transform(x_BTD), None


class ChannelMix(nn.Module):
    """relu(x_k W1)² W2, x_k the token mixed with the one before it: RWKV's feed-forward (RWKV-7, 2503.14456).

    hidden: columns of W1; RWKV-7 has 4 dim of them, RWKV-6 3.5 dim. receptance: true multiplies the output by σ(x_r W),
    x_r another such mix, as in RWKV-6 (2404.05892) and before. Both start as in the authors' code, W2 at 0.

    x [B, T, D] -> [B, T, D]; the matmuls take the attribute `tile` tokens at a time, unless it is None. slot, depth:
    the layer's name to `seq`, and its place in the stack; the model gives them.
    """

    def __init__(self, *, dim: int, hidden: int, receptance: bool = False, slot: str = "ffn", depth: Depth = ALONE):
        super().__init__()
        positive(dim=dim, hidden=hidden)
        self.slot = slot
        self.tile: int | None = None
        down = 1 - depth.layer / depth.layers
        wide_first = orthogonal(1.0) if receptance else uniform(0.5 * dim**-0.5)
        self.mix = declare(dim, axes=("embed",), init=ramp(down if receptance else down**4), decay=False)
        self.key = Linear(dim, hidden, axes=("ffn", "embed"), init=wide_first)
        self.value = Linear(hidden, dim, axes=("embed", "ffn"), init=constant(0.0))
        self.gate = Linear(dim, dim, axes=(None, "embed"), init=constant(0.0)) if receptance else None
        self.gate_mix = declare(dim, axes=("embed",), init=ramp(down), decay=False) if receptance else None

    def _squared(self, x: Tensor) -> Tensor:
        return self.value(self.key(x).relu().square())

    def forward(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, None]:
        delta_BTD = previous(x_BTD, seq, slot=self.slot) - x_BTD
        y_BTD = tiled(self._squared, x_BTD + delta_BTD * self.mix.to(x_BTD.dtype), self.tile)
        if self.gate is not None and self.gate_mix is not None:
            y_BTD = y_BTD * self.gate(x_BTD + delta_BTD * self.gate_mix.to(x_BTD.dtype)).sigmoid()
        return y_BTD, None
