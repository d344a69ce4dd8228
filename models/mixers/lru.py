"""LRU (Orvieto et al. 2023, 2303.06349): a complex diagonal linear recurrence with constant, learnt eigenvalues.

h_t = λ·h_{t-1} + γ·(B x_t), y_t = Re(C h_t) + D·x_t, λ = exp(-e^ν + i·e^θ), then gelu and a gated linear unit. Initial
values: θ uniform, γ = √(1 - |λ|²), and |λ|² even over [r_min², r_max²] rather than drawn from it, since γ must know it
and a parameter starts from its own name alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import Init, declare, normal, positive
from models.linear import Linear
from models.precision import wide
from models.recurrence import Complex
from models.sequence import Sequence
from models.width import UNDIVIDED, Units, Width


def _squares(shape: tuple[int, ...], r_min: float, r_max: float) -> Tensor:
    """|λ|² at the middles of equal parts of [r_min², r_max²]."""
    (N,) = shape
    return r_min**2 + (torch.arange(N) + 0.5) / N * (r_max**2 - r_min**2)


def rates(r_min: float, r_max: float) -> Init:
    """ν, with |λ| = exp(-e^ν)."""
    return lambda shape, generator: (-0.5 * _squares(shape, r_min, r_max).log()).log()


def gains(r_min: float, r_max: float) -> Init:
    """log √(1 - |λ|²), by which white noise leaves a state of variance 1."""
    return lambda shape, generator: 0.5 * torch.log1p(-_squares(shape, r_min, r_max))


def angles(largest: float) -> Init:
    """log of U(0, largest), away from log 0."""
    return lambda shape, generator: (largest * torch.rand(shape, generator=generator)).clamp_min(1e-4).log()


class LRU(nn.Module):
    """The state is dim * expand complex numbers, `dim` the model's.

    heads: has no meaning here, where every number of the state has a decay of its own; accepted so that any mixer
    can take another's place. expand: width of the state in multiples of dim. r_min: smallest |λ| at the start, from
    0. r_max: largest |λ| at the start, below 1; the state forgets in about 1 / (1 - |λ|) tokens. max_phase: largest
    angle of λ at the start, in radians a token.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int | None = None,
        expand: float = 1.0,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 6.28,
    ):
        super().__init__()
        inner = int(dim * expand)
        self.units: Units = {"heads": None}
        positive(dim=dim, **{"dim * expand": inner})
        if not 0 <= r_min < r_max < 1:
            raise ValueError(f"r_min={r_min}: must be from 0 to below r_max={r_max}, itself below 1")
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase={max_phase}: must be above 0 and at most 2π")
        self.width: Width = UNDIVIDED
        self.B = Linear(dim, 2 * inner, axes=("heads", "embed"), init=normal((2 * dim) ** -0.5))
        self.nu_log = declare(inner, axes=("heads",), init=rates(r_min, r_max), decay=False)
        self.theta_log = declare(inner, axes=("heads",), init=angles(max_phase), decay=False)
        self.gamma_log = declare(inner, axes=("heads",), init=gains(r_min, r_max), decay=False)
        self.C = Linear(2 * inner, dim, axes=("embed", "heads"), init=normal(inner**-0.5))
        self.D = declare(dim, axes=("embed",), init=normal(1.0), decay=False)
        self.glu = Linear(dim, 2 * dim, axes=("ffn", "embed"), parts=(dim, dim))
        self.recurrence = Complex("complex")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        u_BTN2 = wide(self.B(x_BTD)).unflatten(-1, (-1, 2)) * wide(self.gamma_log).exp().unsqueeze(-1)
        g_N, turns_N = -wide(self.nu_log).exp(), wide(self.theta_log).exp() / (2 * math.pi)
        g_BTN, turns_BTN = (x.expand(u_BTN2.shape[:-1]) for x in (g_N, turns_N))
        h_BTN2 = seq.scan(self.recurrence, u_BTN2, g_BTN, turns_BTN, slot=slot)
        # Re(C h) = (Re C) (Re h) - (Im C) (Im h): one real matmul, whose weights take the sign.
        y_BTD = self.width.sum(self.C(h_BTN2.flatten(-2).to(x_BTD.dtype))) + self.D.to(x_BTD.dtype) * x_BTD
        value_BTD, gate_BTD = self.glu(F.gelu(y_BTD, approximate="tanh")).chunk(2, dim=-1)
        return self.width.place(value_BTD * gate_BTD.sigmoid(), x_BTD.shape[-1])
