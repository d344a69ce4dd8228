"""Short causal depthwise convolution: the linear mixers' view of the last few tokens."""

import torch
from torch import Tensor, nn

from models.axes import constant, declare, fan_in
from models.kernels.conv import conv
from models.sequence import Sequence


class ShortConv(nn.Module):
    """silu(Σ_j w_j x_{t-j} + b), j < width, per channel. It never reaches across the start of a document.

    bias: whether there is a b. activation: whether silu follows. axis: what the channels are.

    x [B, T, D] -> [B, T, D] in x's dtype. The inputs before a span come from `seq.before`.
    """

    def __init__(
        self, dim: int, width: int = 4, *, bias: bool = False, activation: bool = True, axis: str | None = "heads"
    ):
        super().__init__()
        self.weight = declare(dim, width, axes=(axis, None), init=fan_in(width), matrix=False)
        self.bias = declare(dim, axes=(axis,), init=constant(0.0), decay=False) if bias else None
        self.activation = activation

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        padded_BPD = torch.cat((seq.before(x_BTD, self.weight.shape[1] - 1, slot=slot), x_BTD), dim=1)
        return conv(padded_BPD, self.weight.t().contiguous(), self.bias, seq.positions, silu=self.activation)
