"""Short causal depthwise convolution: the linear mixers' view of the last few tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import constant, declare, fan_in
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
        self.weight = declare(dim, width, axes=(axis, None), init=fan_in(width))
        self.bias = declare(dim, axes=(axis,), init=constant(0.0), decay=False) if bias else None
        self.activation = activation

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        width, T = self.weight.shape[1], x_BTD.shape[1]
        taps = self.weight.t().to(x_BTD.dtype).contiguous()
        padded = torch.cat((seq.before(x_BTD, width - 1, slot=slot), x_BTD), dim=1)
        y = x_BTD * taps[0]
        for j in range(1, width):
            inside = (seq.positions >= j).unsqueeze(-1).to(x_BTD.dtype)
            y = y + padded[:, width - 1 - j : width - 1 - j + T] * inside * taps[j]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return F.silu(y) if self.activation else y
