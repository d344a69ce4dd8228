"""Mamba-2 (Dao & Gu 2024, 2405.21060): a state-space model with a scalar A per head, run as linear attention.

C reads as a query, B writes as a key, dt·x is the value, and dt·A the log decay; B and C are shared by the heads of a
group. Initial values and the order norm(y · silu(z)) are those of the authors' code.
"""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import constant, declare, log_uniform_rate, positive, softplus_inverse_of_log_uniform
from models.conv import short_conv
from models.linear import Linear
from models.mixers.heads import head_dim, repeat_heads
from models.norm import GroupRMSNorm, checked
from models.precision import wide
from models.recurrence import Scalar
from models.sequence import Sequence
from models.width import Units

NormedOutput = Literal["gated", "before_gate", "none"]


class Mamba2(nn.Module):
    """A head's state is a matrix of `state` by dim * expand / heads numbers, `dim` the model's.

    heads: number of heads; must divide dim * expand. expand: inner width in multiples of dim. state: rows of a head's
    state, the width of B and of C. groups: number of B and of C, each for heads / groups heads; must divide heads. The
    norm of the output is over each group's channels. conv: tokens that the short causal convolution on x, B and C sees,
    the present one included; it stays within the document. conv_bias: true gives it a bias. out_norm: place of the
    output's norm: gated behind the product with silu(z), before_gate in front of it, none for no norm (both in
    Falcon-H1, 2507.22448). dt_min: the least step size, as which smaller ones count. norm_eps: epsilon that the norm of
    the output adds to its mean square.

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
        conv: int = 4,
        conv_bias: bool = True,
        out_norm: NormedOutput = "gated",
        dt_min: float = 0.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        positive(dim=dim, state=state, groups=groups)
        inner = int(dim * expand)
        self.units: Units = {"heads": heads, "groups": groups}
        self.value_dim, self.key_dim = head_dim(inner, heads, what="dim * expand"), state
        if heads % groups:
            raise ValueError(f"groups={groups}: must divide heads={heads}")
        if out_norm not in get_args(NormedOutput):
            raise ValueError(f"out_norm={out_norm}: must be one of {', '.join(get_args(NormedOutput))}")
        if not 0 <= dt_min < 1:
            raise ValueError(f"dt_min={dt_min}: must be at least 0 and below 1")
        self.out_norm, self.dt_min = out_norm, dt_min
        self.x = Linear(dim, inner, axes=("heads", "embed"))
        self.z = Linear(dim, inner, axes=("heads", "embed"))
        self.bc = Linear(dim, 2 * groups * state, axes=("groups", "embed"), parts=(state, state))
        self.dt = Linear(dim, heads, axes=("heads", "embed"))
        self.conv = short_conv(inner, conv, bias=conv_bias)
        self.bc_conv = short_conv(2 * groups * state, conv, bias=conv_bias, axis="groups")
        self.A_log = declare(heads, axes=("heads",), init=log_uniform_rate(1.0, 16.0), decay=False)
        self.dt_bias = declare(heads, axes=("heads",), init=softplus_inverse_of_log_uniform(1e-3, 0.1), decay=False)
        self.D = declare(heads, axes=("heads",), init=constant(1.0), decay=False)
        eps = checked(norm_eps)
        self.norm = None if out_norm == "none" else GroupRMSNorm(inner, groups, eps=eps, axis="heads")
        self.out = Linear(inner, dim, axes=("embed", "heads"))
        self.recurrence = Scalar("simple_gla", scale=1.0)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        x_BTHV = self.conv(self.x(x_BTD), seq, slot=slot).unflatten(-1, (-1, self.value_dim))
        bc_BTGN = self.bc_conv(self.bc(x_BTD), seq, slot=f"{slot}/bc").unflatten(-1, (-1, 2, self.key_dim))
        each = x_BTHV.shape[2] // bc_BTGN.shape[2]
        b_BTHN, c_BTHN = (repeat_heads(part, each) for part in bc_BTGN.unbind(-2))
        dt_BTH = F.softplus(wide(self.dt(x_BTD)) + wide(self.dt_bias))
        dt_BTH = dt_BTH.clamp_min(self.dt_min) if self.dt_min else dt_BTH
        g_BTH = -wide(self.A_log).exp() * dt_BTH
        values_BTHV = dt_BTH.unsqueeze(-1) * x_BTHV
        y_BTHV = seq.scan(self.recurrence, c_BTHN, b_BTHN, values_BTHV, g_BTH, slot=slot)
        y_BTHV = y_BTHV + wide(self.D).unsqueeze(-1) * x_BTHV
        return self.out(self._gated(y_BTHV.flatten(-2), F.silu(wide(self.z(x_BTD)))).to(x_BTD.dtype))

    def _gated(self, y_BTD: Tensor, gate_BTD: Tensor) -> Tensor:
        if self.norm is None:
            return y_BTD * gate_BTD
        if self.out_norm == "before_gate":
            return self.norm(y_BTD) * gate_BTD
        normed_BTD: Tensor = self.norm(y_BTD * gate_BTD)
        return normed_BTD
