"""minLSTM (Feng et al. 2024, 2410.01201, section 3.2): an LSTM whose gates do not see the state, and share out 1.

f, i = σ(W_f x), σ(W_i x), f' = f / (f + i), i' = i / (f + i), h_t = f'_t ⊙ h_{t-1} + i'_t ⊙ ĥ_t, with minGRU's
candidate ĥ. The shares are taken in logs, where two closed gates are not 0 / 0; the state itself is carried, not its
log.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import positive
from models.linear import Linear
from models.mixers.mingru import candidate
from models.precision import wide
from models.recurrence import Elementwise
from models.sequence import Sequence
from models.width import Units


class MinLSTM(nn.Module):
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
        self.f = Linear(dim, inner, axes=("heads", "embed"))
        self.i = Linear(dim, inner, axes=("heads", "embed"))
        self.h = Linear(dim, inner, axes=("heads", "embed"))
        self.out = Linear(inner, dim, axes=("embed", "heads"))
        self.recurrence = Elementwise("elementwise")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        # log f' = -log(1 + i/f) = logσ(log f - log i), and i' = 1 - f' alike.
        odds_BTD = F.logsigmoid(wide(self.f(x_BTD))) - F.logsigmoid(wide(self.i(x_BTD)))
        u_BTD = (-odds_BTD).sigmoid() * candidate(self.h(x_BTD))
        h_BTD = seq.scan(self.recurrence, u_BTD, F.logsigmoid(odds_BTD), slot=slot)
        return self.out(h_BTD.to(x_BTD.dtype))
