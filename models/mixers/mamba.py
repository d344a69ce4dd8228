"""Mamba (Gu & Dao 2023, 2312.00752): a state-space model whose step size, input and output maps depend on the token.

Δ = softplus(W_dt dt + b), S_t = e^{Δ A}·S_{t-1} + Δ x Bᵀ, y = S C + D·x, A = -e^{A_log}, where dt, B and C come from
the convolved x; the block is W_out (y · silu(z)). Follows the authors' code, whose Δ·B is not the paper's zero-order
hold: (e^{ΔA} - 1)/A·B differs from it by a tenth at Δ = 0.1 and A = -2. A starts at -1 … -N (S4D-real).
"""

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import constant, declare, positive, softplus_inverse_of_log_uniform, uniform
from models.conv import short_conv
from models.kernels.norm import rms_norm
from models.linear import Linear
from models.norm import RMSNorm, checked
from models.precision import wide
from models.recurrence import Elementwise
from models.sequence import Sequence
from models.width import UNDIVIDED, Units, Width

InnerNorm = Literal["none", "plain", "weighted"]


def harmonics(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """log(1 … N) in each of D rows."""
    return torch.arange(1, shape[1] + 1).log().expand(shape)


class MambaBlock(nn.Module):
    """The base of Mamba and of mixers with its block: x through a short convolution, and out((y + D·x) · silu(z)) of
    what a recurrence reads. A mixer adds the recurrence, `D` and `out`."""

    D: nn.Parameter
    out: nn.Module

    def __init__(self, *, dim: int, expand: float, state: int, rank: int | None, conv: int, conv_bias: bool):
        super().__init__()
        self.width: Width = UNDIVIDED
        self.inside = "rank" if rank is None else None  # the axis, which widens with the model or not
        self.inner, rank = int(dim * expand), math.ceil(dim / 16) if rank is None else rank
        positive(dim=dim, **{"dim * expand": self.inner}, state=state, rank=rank)
        self.units: Units = {"heads": None}
        self.widths = (rank, state, state)
        self.x = Linear(dim, self.inner, axes=("heads", "embed"))
        self.z = Linear(dim, self.inner, axes=("heads", "embed"))
        self.conv = short_conv(self.inner, conv, bias=conv_bias)

    def output(self, y_BTV: Tensor, v_BTV: Tensor, x_BTD: Tensor) -> Tensor:
        """Gates y, the reads of the recurrence, and v, its input, both [B, T, V], by the layer's input: [B, T, D]."""
        y_BTV = (y_BTV + wide(self.D) * v_BTV) * F.silu(wide(self.z(x_BTD)))
        y_BTD: Tensor = self.out(y_BTV.to(x_BTD.dtype))
        return y_BTD


class Mamba(MambaBlock):
    """The state is dim * expand by `state` numbers, `dim` the model's.

    heads: has no meaning here, where every number of the state has a decay of its own; accepted so that any mixer can
    take another's place. expand: inner width in multiples of dim. state: numbers that each inner channel keeps, the
    width of B and of C. rank: width through which the step sizes of all channels are computed; null for dim / 16,
    rounded up. conv: tokens that the short causal convolution before the recurrence sees, the present one included; it
    stays within the document. conv_bias: true gives it a bias. inner_norm: plain normalises what the step sizes are
    made of, B and C, each by itself (Falcon Mamba, 2410.05355), weighted gives these norms weights (Jamba, 2403.19887);
    none leaves them as they are. norm_eps: epsilon that these norms add to the mean square.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int | None = None,
        expand: float = 2.0,
        state: int = 16,
        rank: int | None = None,
        conv: int = 4,
        conv_bias: bool = True,
        inner_norm: InnerNorm = "none",
        norm_eps: float = 1e-6,
    ):
        super().__init__(dim=dim, expand=expand, state=state, rank=rank, conv=conv, conv_bias=conv_bias)
        if inner_norm not in get_args(InnerNorm):
            raise ValueError(f"inner_norm={inner_norm}: must be one of {', '.join(get_args(InnerNorm))}")
        self.plain_eps = checked(norm_eps) if inner_norm == "plain" else None
        self.norms = None
        if inner_norm == "weighted":
            self.norms = nn.ModuleList(RMSNorm(width, eps=checked(norm_eps), axis=None) for width in self.widths)
        inner, rank = self.inner, self.widths[0]
        self.dbc = Linear(inner, sum(self.widths), axes=(None, "heads"), parts=self.widths)
        self.dt = Linear(rank, inner, axes=("heads", self.inside), init=uniform(rank**-0.5))
        dt = softplus_inverse_of_log_uniform(1e-3, 0.1)
        self.dt_bias = declare(inner, axes=("heads",), init=dt, decay=False)
        self.A_log = declare(inner, state, axes=("heads", None), init=harmonics, decay=False)
        self.D = declare(inner, axes=("heads",), init=constant(1.0), decay=False)
        self.out = Linear(inner, dim, axes=("embed", "heads"))
        self.recurrence = Elementwise("mamba", scale=1.0)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        v_BTV = self.conv(self.x(x_BTD), seq, slot=slot)
        dt, b_BTN, c_BTN = self._normed(self.width.sum(self.dbc(v_BTV)).split(self.widths, dim=-1))
        delta_BTV = F.softplus(wide(self.dt(dt)) + wide(self.dt_bias))
        recurrence = replace(self.recurrence, shared=(-wide(self.A_log).exp(),))
        y_BTV = seq.scan(recurrence, c_BTN, b_BTN, wide(v_BTV), delta_BTV, slot=slot)
        return self.output(y_BTV, v_BTV, x_BTD)

    def _normed(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs of the step sizes, B and C, each normalised where that is asked for."""
        if self.norms is not None:
            return tuple(norm(part) for norm, part in zip(self.norms, parts, strict=True))
        eps = self.plain_eps
        return parts if eps is None else tuple(rms_norm(part, None, eps).to(part.dtype) for part in parts)
