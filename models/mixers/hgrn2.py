"""HGRN2 (Qin et al. 2024, 2404.07904): gated linear attention whose key is what its gate lets go, k = 1 - e^g.

Queries through silu, values as they are, gates with a lower bound per layer (see `models.mixers.lower_bounds`), as in
flash-linear-attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import positive
from models.linear import Linear
from models.mixers.heads import head_dim
from models.mixers.lower_bounds import log_forget, lower_bound
from models.norm import RMSNorm, checked
from models.recurrence import Diagonal
from models.sequence import Sequence
from models.width import Units, split


class HGRN2(nn.Module):
    """A head's state is a matrix of dim * expand_k / heads by dim / heads numbers, `dim` the model's.

    heads: number of heads; must divide dim and dim * expand_k. expand_k: width of the gates of all heads together,
    which are the keys, and of the queries, in multiples of dim. norm_eps: epsilon that the norm of the output adds to
    its mean square.

    x [B, T, D] -> [B, T, D]. lower_bound: [dim * expand_k], below which no gate falls; the model gives it.
    """

    def __init__(self, *, dim: int, heads: int, expand_k: float = 1.0, norm_eps: float = 1e-5):
        super().__init__()
        positive(dim=dim)
        keys = int(dim * expand_k)
        self.key_dim = head_dim(keys, heads, what="dim * expand_k")
        self.value_dim = head_dim(dim, heads)
        self.units: Units = {"heads": heads}
        self.widths = (keys, keys, dim)
        self.qfv = Linear(dim, sum(self.widths), axes=("heads", "embed"), parts=self.widths)
        self.norm = RMSNorm(dim, eps=checked(norm_eps), axis="heads")
        self.out = Linear(dim, dim, axes=("embed", "heads"))
        self.recurrence = Diagonal("gla")
        self.couplings = (lower_bound(keys),)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str, lower_bound: Tensor | None = None) -> Tensor:
        q, f, v = split(self.qfv(x_BTD), self.widths)
        g_BTHK = log_forget(f, lower_bound).unflatten(-1, (-1, self.key_dim))
        q_BTHK = F.silu(q).unflatten(-1, (-1, self.key_dim))
        k_BTHK = -torch.expm1(g_BTHK)  # 1 - e^g is 0 where a gate is nearly open
        v_BTHV = v.unflatten(-1, (-1, self.value_dim))
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, g_BTHK, slot=slot)
        return self.out(self.norm(o_BTHV.flatten(-2)))
