"""HGRN (Qin, Yang & Zhong 2023, 2311.04823): an elementwise recurrence that forgets what it lets in.

f = bound + (1 - bound)·σ(W_f x), h_t = f_t·h_{t-1} + (1 - f_t)·silu(W_i x): real, as in flash-linear-attention; the
paper turns h by a learnt angle too. The bound of a layer is that of `models.mixers.lower_bounds`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import positive
from models.linear import Linear
from models.mixers.lower_bounds import log_forget, lower_bound
from models.norm import GatedRMSNorm, checked
from models.recurrence import Elementwise
from models.sequence import Sequence
from models.width import Units


class HGRN(nn.Module):
    """The state is dim * expand numbers, `dim` the model's.

    heads: has no meaning here, where every number of the state has a decay of its own; accepted so that any mixer
    can take another's place. expand: width of the recurrence in multiples of dim. norm_eps: epsilon that the norm of
    the output adds to its mean square.

    x [B, T, D] -> [B, T, D]. lower_bound: [dim * expand], below which no gate falls; the model gives it.
    """

    def __init__(self, *, dim: int, heads: int | None = None, expand: float = 1.0, norm_eps: float = 1e-5):
        super().__init__()
        inner = int(dim * expand)
        self.units: Units = {"heads": None}
        positive(dim=dim, **{"dim * expand": inner})
        self.i = Linear(dim, inner, axes=("heads", "embed"))
        self.f = Linear(dim, inner, axes=("heads", "embed"))
        self.gate = Linear(dim, inner, axes=("heads", "embed"))
        self.norm = GatedRMSNorm(inner, eps=checked(norm_eps), axis="heads")
        self.out = Linear(inner, dim, axes=("embed", "heads"))
        self.recurrence = Elementwise("elementwise")
        self.couplings = (lower_bound(inner),)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str, lower_bound: Tensor | None = None) -> Tensor:
        g_BTD = log_forget(self.f(x_BTD), lower_bound)
        u_BTD = -torch.expm1(g_BTD) * F.silu(self.i(x_BTD))  # 1 - e^g is 0 where a gate is nearly open
        h_BTD = seq.scan(self.recurrence, u_BTD, g_BTD, slot=slot)
        return self.out(self.norm(h_BTD, self.gate(x_BTD)))
