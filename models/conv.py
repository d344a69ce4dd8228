"""Short causal depthwise convolution: the linear mixers' view of the last few tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import constant, declare, fan_in, positive
from models.kernels.conv import conv, conv_token
from models.sequence import Sequence


class ShortConv(nn.Module):
    """silu(Σ_j w_j x_{t-j} + b), j < width, per channel. It never reaches across the start of a document.

    bias: whether there is a b. activation: whether silu follows. axis: what the channels are.
    parts: sizes of what lies side by side in them, as q, k and v do.

    x [B, T, D] -> [B, T, D] in x's dtype. The inputs before a span come from `seq.before`.
    """

    def __init__(
        self,
        dim: int,
        width: int = 4,
        *,
        bias: bool = False,
        activation: bool = True,
        axis: str | None = "heads",
        parts: tuple[int, ...] = (),
    ):
        super().__init__()
        self.weight = declare(dim, width, axes=(axis, None), init=fan_in(width), matrix=False, parts=parts)
        self.bias = declare(dim, axes=(axis,), init=constant(0.0), decay=False, parts=parts) if bias else None
        self.activation = activation

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        before_BPD = seq.before(x_BTD, self.weight.shape[1] - 1, slot=slot)
        if seq.decoding:
            return conv_token(before_BPD, x_BTD, self.weight, self.bias, silu=self.activation)
        padded_BPD = torch.cat((before_BPD, x_BTD), dim=1)
        return conv(padded_BPD, self.weight.t().contiguous(), self.bias, seq.positions, silu=self.activation)


class Pointwise(nn.Module):
    """The stand-in for a convolution that is switched off: silu(x), or x without an activation."""

    def __init__(self, *, activation: bool = True):
        super().__init__()
        self.activation = activation

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        return F.silu(x_BTD) if self.activation else x_BTD


def short_conv(
    dim: int,
    width: int | None,
    *,
    bias: bool = False,
    activation: bool = True,
    off: bool = True,
    axis: str | None = "heads",
    parts: tuple[int, ...] = (),
) -> ShortConv | Pointwise:
    """The convolution of a mixer's options. width: null for none; off: whether silu stays without one.

    Raises ValueError for a width below 1, and for a bias of no convolution.
    """
    if width is None:
        if bias:
            raise ValueError("conv_bias=true: must be false with conv=null: there is no convolution")
        return Pointwise(activation=off)
    positive(conv=width)
    return ShortConv(dim, width, bias=bias, activation=activation, axis=axis, parts=parts)
