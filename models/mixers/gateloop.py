"""GateLoop (Katsch 2023, 2311.01927): linear attention whose decay is complex, and chosen by the token.

a_t = σ(α_t)·e^{iβ_t}, h_t = a_t·h_{t-1} + k_t v_t, y_t = q_t·Re(h_t), α and β linear in x, then a gate silu(W_g x).
One head a channel, where the paper found it best: keys and values are one number each. Follows the paper: the
well-known other implementation takes |a| from one complex projection, and its |a| never falls below ½.

The paper gives no initial values. Here α's bias spreads the decays over channels, σ evenly from 0.9 to 0.99, and β
starts at a tenth of what its input would give, so that angles start small.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import declare, fan_in, positive
from models.linear import Linear
from models.precision import wide
from models.recurrence import Complex
from models.sequence import Sequence
from models.width import Units


def slow(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The logits of decays from 0.9 to 0.99."""
    return torch.linspace(0.9, 0.99, shape[0]).logit()


class GateLoop(nn.Module):
    """The state is dim * expand complex numbers, `dim` the model's.

    heads: has no meaning here, where every number of the state has a decay of its own; accepted so that any mixer
    can take another's place. expand: width of the recurrence in multiples of dim.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(self, *, dim: int, heads: int | None = None, expand: float = 1.0):
        super().__init__()
        inner = int(dim * expand)
        self.units: Units = {"heads": None}
        positive(dim=dim, **{"dim * expand": inner})
        self.qkv = Linear(dim, 3 * inner, axes=("heads", "embed"), parts=(1, 1, 1))
        self.alpha = Linear(dim, inner, axes=("heads", "embed"))
        self.alpha_bias = declare(inner, axes=("heads",), init=slow, decay=False)
        self.beta = Linear(dim, inner, axes=("heads", "embed"), bias=True, init=fan_in(dim, gain=0.1))
        self.gate = Linear(dim, inner, axes=("heads", "embed"))
        self.out = Linear(inner, dim, axes=("embed", "heads"))
        self.recurrence = Complex("complex")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTN, k_BTN, v_BTN = wide(self.qkv(x_BTD)).unflatten(-1, (-1, 3)).unbind(-1)
        g_BTN = F.logsigmoid(wide(self.alpha(x_BTD)) + wide(self.alpha_bias))
        turns_BTN = wide(self.beta(x_BTD)) / (2 * math.pi)
        written_BTN = k_BTN * v_BTN
        u_BTN2 = torch.stack((written_BTN, torch.zeros_like(written_BTN)), dim=-1)
        h_BTN2 = seq.scan(self.recurrence, u_BTN2, g_BTN, turns_BTN, slot=slot)
        y_BTN = q_BTN * h_BTN2[..., 0] * F.silu(wide(self.gate(x_BTD)))
        return self.out(y_BTN.to(x_BTD.dtype))
