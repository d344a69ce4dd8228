"""sLSTM (Beck et al. 2024, 2405.04517, section 2.2): an LSTM with exponential gates and a normaliser, whose gates see
the output before them, head by head. Its steps are no affine maps: over ranks the state goes from one to the next.

As in the authors' block, the input and forget gates see the token through a short convolution with silu, the candidate
and the output gate see it as it is, and each head's output is normalised. The recurrent weights start at zero, and the
forget gates open by channels, r from 0 to 1 in a head, and by layers: f̃ = 5 - 12·r^(0.3 + 1.3·l/(L-1)).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.axes import Init, constant, declare, positive
from models.conv import short_conv
from models.cross_layer import ALONE, Depth
from models.kernels import slstm
from models.linear import Linear
from models.mixers.heads import head_dim
from models.nonlinear_recurrence import Ran, Serial
from models.norm import HeadNorm, checked
from models.precision import wide
from models.sequence import Sequence
from models.width import Units


@dataclass(frozen=True)
class Cell(Serial):
    """xs: W x + b [B, T, H, 4K]; shared: R [H, K, 4K]. See `models.kernels.slstm`."""

    rule = "slstm"

    def nothing(self, *xs: Tensor) -> Tensor:
        x_BTHJ = xs[0]
        return x_BTHJ.new_zeros(*x_BTHJ.shape[:1], x_BTHJ.shape[2], 4, x_BTHJ.shape[3] // 4)

    def run(self, xs: tuple[Tensor, ...], shared: tuple[Tensor, ...], positions: Tensor, state: Tensor) -> Ran:
        return slstm.run(xs[0], shared[0], positions, state)


class SLSTM(nn.Module):
    """The state is 4 * dim numbers, `dim` the model's: memory, normaliser, its unit, and the output.

    heads: number of heads; a head's gates see its own outputs only; must divide dim. conv: tokens that the short causal
    convolution before the input and forget gates sees, the present one included; it stays within the document; null for
    none, and no activation either. conv_bias: true gives it a bias. norm_eps: epsilon that the norm of a head's output
    adds to its variance.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        conv: int | None = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-6,
        depth: Depth = ALONE,
    ):
        super().__init__()
        positive(dim=dim)
        self.units: Units = {"heads": heads}
        self.head_dim = K = head_dim(dim, heads)
        self.conv = short_conv(dim, conv, bias=conv_bias, off=False, axis="embed")
        self.gates = Linear(dim, 2 * dim, axes=("heads", "embed"))
        self.values = Linear(dim, 2 * dim, axes=("heads", "embed"))
        self.R = declare(heads, K, 4 * K, axes=("heads", None, None), init=constant(0.0))
        self.bias = declare(heads, 4, K, axes=("heads", None, None), init=opening(depth), decay=False)
        self.norm = HeadNorm(dim, eps=checked(norm_eps))
        self.out = Linear(dim, dim, axes=("embed", "heads"))
        self.recurrence = Cell()

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        if_BTHJ = self.gates(self.conv(x_BTD, seq, slot=slot)).unflatten(-1, (-1, 2 * self.head_dim))
        zo_BTHJ = self.values(x_BTD).unflatten(-1, (-1, 2 * self.head_dim))
        raw_BTHJ = wide(torch.cat((if_BTHJ, zo_BTHJ), dim=-1)) + wide(self.bias).flatten(1)
        cell = replace(self.recurrence, shared=(self.R.to(raw_BTHJ.dtype),))
        h_BTHK = seq.scan(cell, raw_BTHJ, slot=slot)
        return self.out(self.norm(h_BTHK).to(x_BTD.dtype))


def opening(depth: Depth) -> Init:
    """The biases [H, 4, K] of (ĩ, f̃, z̃, õ)."""
    power = 0.3 + 1.3 * depth.layer / max(depth.layers - 1, 1)

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        start = torch.zeros(shape)
        start[:, 1] = 5.0 - 12.0 * torch.linspace(0, 1, shape[-1]) ** power
        return start

    return init
