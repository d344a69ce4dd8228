"""Mamba-3 (Lahoti et al. 2026, 2603.15569), one input and one output a head: a state-space model by the trapezoidal
rule, with a complex state.

With α_t = e^{Δ_t A_t}, λ_t = σ(·) and γ_t = λ_t Δ_t, what a token writes counts once when it comes and once more before
the next decay:

    h_t = α_t R_t (h_{t-1} + (1 - λ_t) Δ_t B_{t-1} x_{t-1}) + γ_t B_t x_t,    y_t = C_tᵀ h_t + D x_t,

R_t a rotation of pairs of the state's rows by Δ_t θ_t: a complex eigenvalue. Two forms make it a scan that exists:

- R_t may be taken out of the state: B and C turned by all angles of their document so far, as rotary positions are,
  see a state that only decays. The sum of angles is a recurrence of its own, whose state is a complex number of length
  1.
- H_t = h_t - γ_t B_t x_t holds what lies before t, whole: H_t = α_t (H_{t-1} + (γ_{t-1} + (1 - λ_t) Δ_t) B_{t-1}
  x_{t-1}). So one scan of keys and values that are a token late gives both halves of the rule, and γ_t (C_t·B_t) x_t is
  added to what it reads. B, x and γ of one token before a span come from `seq.before`.

B and C have a norm each and a bias by head, which starts at 1; there is no convolution. Initial values, the activation
of A and the angles π·tanh(·) are those of the authors' code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import constant, declare, positive, softplus_inverse_of_log_uniform
from models.linear import Linear
from models.mixers.heads import head_dim, repeat_heads
from models.norm import GroupRMSNorm, RMSNorm, checked
from models.precision import wide
from models.recurrence import Complex, Scalar
from models.sequence import Sequence
from models.token_shift import previous
from models.width import Units

SLOWEST = 1e-4  # the least rate -A at which a state decays


class Mamba3(nn.Module):
    """A head's state is a matrix of `state` by dim * expand / heads numbers, `dim` the model's.

    heads: number of heads; must divide dim * expand. expand: inner width in multiples of dim. state: rows of a head's
    state, the width of B and of C; at least 2. groups: number of B and of C, each for heads / groups heads; must divide
    heads. rotated: share of the rows that are pairs which turn, from above 0 to 1. out_norm: true puts a norm of each
    head behind the scan, before the product with silu(z). norm_eps: epsilon that the norms of B, of C and of the output
    add to the mean square.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        expand: float = 2.0,
        state: int = 64,
        groups: int = 1,
        rotated: float = 0.5,
        out_norm: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        positive(dim=dim, state=state, groups=groups)
        inner = int(dim * expand)
        self.units: Units = {"heads": heads, "groups": groups}
        self.value_dim, self.key_dim = head_dim(inner, heads, what="dim * expand"), state
        if heads % groups:
            raise ValueError(f"groups={groups}: must divide heads={heads}")
        if state < 2:
            raise ValueError(f"state={state}: must be at least 2, a pair of rows that turns")
        if not 0 < rotated <= 1:
            raise ValueError(f"rotated={rotated}: must be above 0 and at most 1")
        pairs = max(1, int(state * rotated) // 2)
        self.x = Linear(dim, inner, axes=("heads", "embed"))
        self.z = Linear(dim, inner, axes=("heads", "embed"))
        self.bc = Linear(dim, 2 * groups * state, axes=("groups", "embed"), parts=(state, state))
        self.rates = Linear(dim, 3 * heads, axes=("heads", "embed"), parts=(1, 1, 1))
        self.angles = Linear(dim, pairs, axes=(None, "embed"))
        self.dt_bias = declare(heads, axes=("heads",), init=softplus_inverse_of_log_uniform(1e-3, 0.1), decay=False)
        self.b_norm = RMSNorm(state, eps=checked(norm_eps), axis=None)
        self.c_norm = RMSNorm(state, eps=norm_eps, axis=None)
        ones = constant(1.0)
        self.b_bias = declare(heads, state, axes=("heads", None), init=ones, decay=False, matrix=False)
        self.c_bias = declare(heads, state, axes=("heads", None), init=ones, decay=False, matrix=False)
        self.D = declare(heads, axes=("heads",), init=constant(1.0), decay=False)
        self.norm = GroupRMSNorm(inner, heads, eps=norm_eps, axis="heads") if out_norm else None
        self.out = Linear(inner, dim, axes=("embed", "heads"))
        self.recurrence = Scalar("simple_gla", scale=1.0)
        self.turning = Complex("complex")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        x_BTHV = self.x(x_BTD).unflatten(-1, (-1, self.value_dim))
        dt_BTH, a_BTH, trap_BTH = wide(self.rates(x_BTD)).unflatten(-1, (-1, 3)).unbind(-1)
        dt_BTH = F.softplus(dt_BTH + wide(self.dt_bias))
        g_BTH = -heavy_tail(a_BTH).clamp_min(SLOWEST) * dt_BTH
        now_BTH = trap_BTH.sigmoid() * dt_BTH
        b_BTHN, c_BTHN = self._turned(x_BTD, dt_BTH, seq, slot=slot)

        late = previous(torch.cat((b_BTHN, x_BTHV), dim=-1).flatten(-2), seq, slot=f"{slot}/late")
        k_BTHN, v_BTHV = late.unflatten(-1, (-1, self.key_dim + self.value_dim)).split(
            (self.key_dim, self.value_dim), dim=-1
        )
        weight_BTH = g_BTH.exp() * (previous(now_BTH, seq, slot=f"{slot}/step") + dt_BTH - now_BTH)
        values_BTHV = weight_BTH.unsqueeze(-1) * v_BTHV
        y_BTHV = seq.scan(self.recurrence, c_BTHN, k_BTHN, values_BTHV, g_BTH, slot=slot)

        own_BTH = now_BTH * (wide(c_BTHN) * wide(b_BTHN)).sum(-1) + wide(self.D)
        y_BTD = (y_BTHV + own_BTH.unsqueeze(-1) * x_BTHV).flatten(-2)
        y_BTD = y_BTD if self.norm is None else self.norm(y_BTD)
        return self.out((y_BTD * F.silu(wide(self.z(x_BTD)))).to(x_BTD.dtype))

    def _turned(self, x_BTD: Tensor, dt_BTH: Tensor, seq: Sequence, *, slot: str) -> tuple[Tensor, Tensor]:
        """B and C of each head, normed, with their biases, turned by the angles of their document up to each token:
        [B, T, H, N] each, in x's dtype."""
        bc_BTGN = self.bc(x_BTD).unflatten(-1, (-1, 2, self.key_dim))
        each = dt_BTH.shape[2] // bc_BTGN.shape[2]
        b_BTGN, c_BTGN = bc_BTGN.unbind(-2)
        b_BTHN = repeat_heads(self.b_norm.normed(b_BTGN), each) + wide(self.b_bias)
        c_BTHN = repeat_heads(self.c_norm.normed(c_BTGN), each) + wide(self.c_bias)
        turns_BTHS = dt_BTH.unsqueeze(-1) * (wide(self.angles(x_BTD)).tanh() / 2).unsqueeze(2)
        zero = torch.zeros_like(turns_BTHS)
        begun = seq.starts[..., None, None].to(zero.dtype) + zero
        rotor_BTHS2 = seq.scan(
            self.turning, torch.stack((begun, zero), dim=-1), zero, turns_BTHS, slot=f"{slot}/angles"
        )
        return tuple(_turn(y, rotor_BTHS2).to(x_BTD.dtype) for y in (b_BTHN, c_BTHN))  # type: ignore[return-value]


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x where x ≥ 0, else 1 / (1 - x): above 0, and smooth at 0."""
    return x.clamp_min(0.0) + (1 - x.clamp_max(0.0)).reciprocal()


def _turn(x_BTHN: Tensor, rotor_BTHS2: Tensor) -> Tensor:
    """Rows 2i and 2i + 1 turned by rotor i; those beyond the last pair stay."""
    turning, rest = x_BTHN.split((2 * rotor_BTHS2.shape[-2], x_BTHN.shape[-1] - 2 * rotor_BTHS2.shape[-2]), dim=-1)
    re, im = turning.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotor_BTHS2.unbind(-1)
    turned = torch.stack((re * cos - im * sin, re * sin + im * cos), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1)
