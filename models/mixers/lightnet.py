"""LightNet (You Only Scan Once, Qin et al. 2024, 2405.21022): what a key channel remembers is an average of values.

S_t = diag(e^{z_{t-1} - z_t})·S_{t-1} + e^{k_t - z_t} v_tᵀ, z_t = log Σ_{s≤t} e^{k_s}: every token weighs in by e^k for
good, and the decay is what keeps the weights of a channel at a sum of 1. Queries through silu, RMSNorm over all heads,
then silu of a low-rank gate, as in flash-linear-attention, which leaves the paper's positions (LRPE, TPE) out.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import positive
from models.linear import Linear
from models.mixers.heads import head_dim
from models.norm import GatedRMSNorm, checked
from models.recurrence import Normalised
from models.sequence import Sequence
from models.width import Units, split


class LightNet(nn.Module):
    """A head's state is a matrix of dim * expand_k / heads by dim / heads numbers, `dim` the model's, and for each of
    its rows the log of the sum of weights.

    heads: number of heads; must divide dim and dim * expand_k. expand_k: width of the keys of all heads together, and
    of the queries, in multiples of dim. norm_eps: epsilon that the norm of the output adds to its mean square.

    The output's gate comes through a bottleneck as wide as a head's values.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(self, *, dim: int, heads: int, expand_k: float = 1.0, norm_eps: float = 1e-5):
        super().__init__()
        positive(dim=dim)
        keys = int(dim * expand_k)
        self.key_dim = head_dim(keys, heads, what="dim * expand_k")
        self.value_dim = head_dim(dim, heads)
        self.units: Units = {"heads": heads}
        self.widths = (keys, keys, dim)
        self.qkv = Linear(dim, sum(self.widths), axes=("heads", "embed"), parts=self.widths)
        self.gate_in = Linear(dim, self.value_dim, axes=(None, "embed"))
        self.gate_out = Linear(self.value_dim, dim, axes=("heads", None))
        self.norm = GatedRMSNorm(dim, eps=checked(norm_eps), axis="heads")
        self.out = Linear(dim, dim, axes=("embed", "heads"))
        self.recurrence = Normalised("lightnet")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q, k, v = split(self.qkv(x_BTD), self.widths)
        q_BTHK, k_BTHK = (x.unflatten(-1, (-1, self.key_dim)) for x in (F.silu(q), k))
        v_BTHV = v.unflatten(-1, (-1, self.value_dim))
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, slot=slot)
        return self.out(self.norm(o_BTHV.flatten(-2), self.gate_out(self.gate_in(x_BTD))))
