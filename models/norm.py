"""Root-mean-square normalisation (arXiv 1910.07467), LayerNorm, their forms for mixer outputs, and norms of heads."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import constant, declare
from models.kernels.norm import l2_norm, rms_norm, rms_norm_gated, rms_norm_narrow
from models.precision import wide
from models.width import UNDIVIDED, Width


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, computed in at least fp32, returned in x's dtype.

    axis: what the channels are; heads may lie on several devices, which then add up their squares.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, axis: str | None = "embed"):
        super().__init__()
        self.eps, self.dim = eps, dim
        self.width: Width = UNDIVIDED
        self.weight = declare(dim, axes=(axis,), init=constant(1.0), decay=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.dim:
            return rms_norm_narrow(x, wide(self.weight), self.eps)
        return self.normed(x).to(x.dtype)

    def normed(self, x: Tensor) -> Tensor:
        """The same in at least fp32."""
        if x.shape[-1] == self.dim:
            return rms_norm(x, wide(self.weight), self.eps)
        begin, end = self.width.span(self.dim)
        copies = x.shape[-1] // (end - begin)  # devices that hold the same channels, as those of shared key heads
        squares = self.width.sum(wide(x).square().sum(-1, keepdim=True)) / copies
        return wide(x) * (squares / self.dim + self.eps).rsqrt() * wide(self.weight)


class LayerNorm(nn.Module):
    """(x - mean) / deviation · weight + bias over the last dimension (1607.06450), computed in at least fp32, returned
    in x's dtype. No device may hold a part of the channels only."""

    def __init__(self, dim: int, *, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = declare(dim, axes=("embed",), init=constant(1.0), decay=False)
        self.bias = declare(dim, axes=("embed",), init=constant(0.0), decay=False, matrix=False)

    def forward(self, x: Tensor) -> Tensor:
        wider = wide(x)
        weight, bias = (each.to(wider.dtype) for each in (self.weight, self.bias))
        return F.layer_norm(wider, x.shape[-1:], weight, bias, self.eps).to(x.dtype)


NormKind = Literal["rms", "layer"]
NORMS: dict[str, Callable[..., nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


def norm_of(kind: str) -> Callable[..., nn.Module]:
    """The class of this name. Raises ValueError for another."""
    if kind not in NORMS:
        raise ValueError(f"norm={kind}: must be one of {', '.join(NORMS)}")
    return NORMS[kind]


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) · activation(gate), silu unless told otherwise: per head when the last dimension is a head's, so that
    no rank needs another's heads."""

    def __init__(
        self,
        dim: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.silu,
        eps: float = 1e-5,
        axis: str | None = "embed",
    ):
        super().__init__(dim, eps=eps, axis=axis)
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        if x.shape[-1] == self.dim:
            return rms_norm_gated(x, gate, wide(self.weight), self.eps, self.activation)
        return (self.normed(x) * self.activation(wide(gate))).to(gate.dtype)


class GroupRMSNorm(RMSNorm):
    """RMSNorm of each of `groups` equal parts of the last dimension, every channel with a weight of its own."""

    def __init__(self, dim: int, groups: int, *, eps: float = 1e-5, axis: str | None = "embed"):
        super().__init__(dim, eps=eps, axis=axis)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        channels = self.dim // self.groups
        begin, end = self.width.span(self.dim)
        if (end - begin) % channels:  # some of one group, whose others lie elsewhere
            own = F.one_hot(torch.tensor(begin // channels, device=x.device), self.groups).to(wide(x).dtype)
            squares = (self.width.sum(wide(x).square().sum(-1, keepdim=True) * own) * own).sum(-1, keepdim=True)
            return (wide(x) * (squares / channels + self.eps).rsqrt() * wide(self.weight)).to(x.dtype)
        parts = wide(x).unflatten(-1, (-1, channels))
        return (rms_norm(parts, None, self.eps).flatten(-2) * wide(self.weight)).to(x.dtype)


class HeadNorm(nn.Module):
    """LayerNorm of each head, a weight a channel that starts at `weight`, and with `bias` a bias: x [B, T, H, V] ->
    [B, T, H·V] in at least fp32."""

    def __init__(self, dim: int, *, eps: float = 1e-6, weight: float = 1.0, bias: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = declare(dim, axes=("heads",), init=constant(weight), decay=False)
        self.bias = declare(dim, axes=("heads",), init=constant(0.0), decay=False) if bias else None

    def forward(self, x_BTHV: Tensor) -> Tensor:
        normed = F.layer_norm(wide(x_BTHV), x_BTHV.shape[-1:], eps=self.eps).flatten(-2) * wide(self.weight)
        return normed if self.bias is None else normed + wide(self.bias)


def checked(norm_eps: float) -> float:
    """The same number. Raises ValueError for one that is not above 0 and finite."""
    if not 0 < norm_eps < float("inf"):
        raise ValueError(f"norm_eps={norm_eps}: must be above 0")
    return norm_eps


def l2_normalise(x: Tensor) -> Tensor:
    """x · rsqrt(Σx² + 1e-6) over the last dimension: the eps of flash-linear-attention and transformers alike."""
    return l2_norm(x, 1e-6)
