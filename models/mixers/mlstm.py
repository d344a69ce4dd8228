"""mLSTM (Beck et al. 2024, 2405.04517) in the block of xLSTM-7B (2503.13427): a matrix memory with exponential gates.

C_t = σ(f̃_t)·C_{t-1} + e^{ĩ_t} k_t v_tᵀ, n_t alike with v = 1, h = C q / max(|n·q|, 1), each head normalised, then
multiplied by an output gate. Gates are capped smoothly at ±15; they start without seeing the input, the forget gates
open from head to head (f̃ from 3 to 6), the input gates nearly closed (ĩ = -10), as in the authors' code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import constant, declare, positive
from models.linear import Linear
from models.mixers.heads import head_dim
from models.norm import HeadNorm, checked
from models.precision import wide
from models.recurrence import Stabilised
from models.sequence import Sequence
from models.width import Units

CAP = 15.0


def opening(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The biases [H, 2] of (ĩ, f̃)."""
    return torch.stack((torch.full(shape[:1], -10.0), torch.linspace(3.0, 6.0, shape[0])), dim=-1)


class MLSTM(nn.Module):
    """A head's state is a matrix of dim * expand_k / heads by dim * expand_v / heads numbers, `dim` the model's, the
    sum of its keys, and the unit of both.

    heads: number of heads; must divide dim * expand_k and dim * expand_v. expand_k: width of the keys of all heads
    together, and of the queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples
    of dim. norm_eps: epsilon that the norm of a head's output adds to its variance.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(self, *, dim: int, heads: int, expand_k: float = 0.5, expand_v: float = 1.0, norm_eps: float = 1e-6):
        super().__init__()
        positive(dim=dim)
        self.units: Units = {"heads": heads}
        keys, values = int(dim * expand_k), int(dim * expand_v)
        self.key_dim = head_dim(keys, heads, what="dim * expand_k")
        self.value_dim = head_dim(values, heads, what="dim * expand_v")
        self.q = Linear(dim, keys, axes=("heads", "embed"))
        self.k = Linear(dim, keys, axes=("heads", "embed"))
        self.v = Linear(dim, values, axes=("heads", "embed"))
        self.rates = Linear(dim, 2 * heads, axes=("heads", "embed"), init=constant(0.0), parts=(1, 1))
        self.rates_bias = declare(heads, 2, axes=("heads", None), init=opening, decay=False)
        self.gate = Linear(dim, values, axes=("heads", "embed"))
        self.norm = HeadNorm(values, eps=checked(norm_eps))
        self.out = Linear(values, dim, axes=("embed", "heads"))
        self.recurrence = Stabilised("mlstm")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK, k_BTHK = (w(x_BTD).unflatten(-1, (-1, self.key_dim)) for w in (self.q, self.k))
        v_BTHV = self.v(x_BTD).unflatten(-1, (-1, self.value_dim))
        rates_BTH2 = wide(self.rates(x_BTD)).unflatten(-1, (-1, 2)) + wide(self.rates_bias)
        i_BTH, f_BTH = (CAP * (rates_BTH2 / CAP).tanh()).unbind(-1)
        h_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, wide(v_BTHV), i_BTH, F.logsigmoid(f_BTH), slot=slot)
        return self.out((self.norm(h_BTHV) * wide(self.gate(x_BTD)).sigmoid()).to(x_BTD.dtype))
