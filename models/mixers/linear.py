"""Linear attention (Katharopoulos et al. 2020, 2006.16236): softmax's kernel replaced by φ(q)·φ(k), nothing forgotten.

The sum Σ_s φ(q_t)·φ(k_s) that divides the output in the paper grows with the document, and RMSNorm takes its scale
away as well; flash-linear-attention therefore leaves it out by default, and so does this.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.linear import Linear
from models.mixers.qkv import QKVMixer
from models.norm import RMSNorm, checked
from models.recurrence import Identity
from models.sequence import Sequence

LinearFeature = Literal["elu", "relu", "identity"]
FEATURES = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}
EPS = 1e-10


class LinearAttention(QKVMixer):
    """A head's state is a matrix of dim * expand_k / heads by dim * expand_v / heads numbers, `dim` the model's.

    heads: number of heads; must divide dim * expand_k and dim * expand_v. expand_k: width of the keys of all heads
    together, and of the queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples
    of dim. feature: the map φ of queries and keys; elu is elu(x) + 1, the paper's. normalise: true divides the output
    by Σ_s φ(q_t)·φ(k_s), as in the paper; with `identity` that sum may be zero. norm_eps: epsilon that the norm of a
    head's output adds to its mean square.

    x [B, T, D] -> [B, T, D].
    """

    INHERITS = True

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature: LinearFeature = "elu",
        normalise: bool = False,
        norm_eps: float = 1e-5,
    ):
        if feature not in FEATURES:
            raise ValueError(f"feature={feature}: must be one of {', '.join(FEATURES)}")
        super().__init__(dim=dim, heads=heads, expand_k=expand_k, expand_v=expand_v)
        self.feature, self.normalise = FEATURES[feature], normalise
        self.norm = RMSNorm(self.value_dim, eps=checked(norm_eps), axis=None)
        self.out = Linear(self.values, dim, axes=("embed", "heads"))
        self.recurrence = Identity("linear")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD, seq, slot=slot)
        q_BTHK, k_BTHK = self.feature(q_BTHK), self.feature(k_BTHK)
        if self.normalise:  # the sum is what a value of one would give
            v_BTHV = torch.cat((v_BTHV, torch.ones_like(v_BTHV[..., :1])), dim=-1)
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, slot=slot)
        if self.normalise:
            o_BTHV, sum_BTH1 = o_BTHV.split((self.value_dim, 1), dim=-1)
            o_BTHV = o_BTHV / (sum_BTH1 + EPS)
        return self.output(o_BTHV)
