"""Gated linear attention (Yang et al. 2023, 2312.06635): a data-dependent decay per key channel.

Gate: g = log σ(W2 W1 x + b) / 16, W1 of rank 16, as in the paper's section 4.4 and flash-linear-attention. The short
convolution on q, k, v is flash-linear-attention's option of the same name.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from models.linear import Linear
from models.mixers.qkv import QKVMixer
from models.norm import GatedRMSNorm, checked
from models.precision import wide
from models.recurrence import Diagonal
from models.sequence import Sequence

GATE_RANK, GATE_TEMPERATURE = 16, 16.0
GatedFeature = Literal["identity", "elu", "relu", "silu"]
FEATURES = {"identity": lambda x: x, "elu": lambda x: F.elu(x) + 1, "relu": F.relu, "silu": F.silu}


class GatedLinearAttention(QKVMixer):
    """A head's state is a matrix of dim * expand_k / heads by dim * expand_v / heads numbers, `dim` the model's.

    heads: number of heads; must divide dim * expand_k and dim * expand_v. expand_k: width of the keys of all heads
    together, and of the queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples
    of dim. conv: tokens that the short causal convolution on queries, keys and values sees, the present one included;
    it stays within the document; null for none, and no activation either, as in the paper. conv_bias: true gives the
    convolution a bias. feature: a map of queries and keys behind it, one of identity, elu (elu(x) + 1), relu and silu.
    norm_eps: epsilon that the norm of a head's output adds to its mean square.

    x [B, T, D] -> [B, T, D].
    """

    INHERITS = True

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        conv: int | None = 4,
        conv_bias: bool = False,
        feature: GatedFeature = "identity",
        norm_eps: float = 1e-5,
    ):
        if feature not in FEATURES:
            raise ValueError(f"feature={feature}: must be one of {', '.join(FEATURES)}")
        super().__init__(dim=dim, heads=heads, expand_k=expand_k, expand_v=expand_v, conv=conv, conv_bias=conv_bias)
        self.feature = FEATURES[feature]
        self.decay_in = Linear(dim, GATE_RANK, axes=(None, "embed"))
        self.decay_out = Linear(GATE_RANK, self.keys, axes=("heads", None), bias=True)
        self.gate = Linear(dim, self.values, axes=("heads", "embed"))
        self.norm = GatedRMSNorm(self.value_dim, eps=checked(norm_eps), axis=None)
        self.out = Linear(self.values, dim, axes=("embed", "heads"))
        self.recurrence = Diagonal("gla")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD, seq, slot=slot)
        q_BTHK, k_BTHK = self.feature(q_BTHK), self.feature(k_BTHK)
        g_BTHK = F.logsigmoid(wide(self.decay_out(self.decay_in(x_BTD)))).unflatten(-1, (-1, self.key_dim))
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, g_BTHK / GATE_TEMPERATURE, slot=slot)
        return self.output(o_BTHV, self.gate(x_BTD))
