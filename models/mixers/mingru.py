"""minGRU (Feng et al. 2024, 2410.01201, section 3.1): a GRU whose gate and candidate do not see the state.

z_t = σ(W_z x_t), h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ ĥ_t, ĥ_t = g(W_h x_t), g(x) = x + ½ for x ≥ 0, else σ(x): the
positive candidate of the paper's appendix B. There it lets the scan run in logs, which loses three digits in fp32
against the linear scan used here; a trained weight means the same in either.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import positive
from models.linear import Linear
from models.precision import wide
from models.recurrence import Elementwise
from models.sequence import Sequence
from models.width import Units


def candidate(x: Tensor) -> Tensor:
    """g(x) > 0, in at least fp32."""
    return torch.where(wide(x) >= 0, wide(x) + 0.5, wide(x).sigmoid())


class MinGRU(nn.Module):
    """The state is dim * expand numbers, `dim` the model's.

    heads: has no meaning here, where every number of the state has a decay of its own; accepted so that any mixer
    can take another's place. expand: width of the recurrence in multiples of dim.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(self, *, dim: int, heads: int | None = None, expand: float = 1.0):
        super().__init__()
        inner = int(dim * expand)
        self.units: Units = {"heads": None}
        positive(dim=dim, **{"dim * expand": inner})
        self.z = Linear(dim, inner, axes=("heads", "embed"))
        self.h = Linear(dim, inner, axes=("heads", "embed"))
        self.out = Linear(inner, dim, axes=("embed", "heads"))
        self.recurrence = Elementwise("elementwise")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        z_BTD = wide(self.z(x_BTD))
        u_BTD = z_BTD.sigmoid() * candidate(self.h(x_BTD))
        h_BTD = seq.scan(self.recurrence, u_BTD, F.logsigmoid(-z_BTD), slot=slot)
        return self.out(h_BTD.to(x_BTD.dtype))
