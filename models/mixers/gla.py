"""Gated linear attention (Yang et al. 2023, 2312.06635): a data-dependent decay per key channel.

Gate: g = log σ(W2 W1 x + b) / 16, W1 of rank 16, as in the paper's section 4.4 and flash-linear-attention. The short
convolution on q, k, v is flash-linear-attention's option of the same name.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import positive
from models.conv import ShortConv
from models.linear import Linear
from models.mixers.heads import head_dim
from models.norm import GatedRMSNorm
from models.precision import wide
from models.recurrence import Diagonal
from models.sequence import Sequence

GATE_RANK, GATE_TEMPERATURE = 16, 16.0


class GatedLinearAttention(nn.Module):
    """A head's state is a matrix of dim * expand_k / heads by dim * expand_v / heads numbers, `dim` the model's.

    heads: how many; must divide dim * expand_k and dim * expand_v. expand_k: width of the keys of all heads together,
    and of the queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples of dim.
    conv: tokens that the short causal convolution on queries, keys and values sees, the present one included; it stays
    within the document.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(self, *, dim: int, heads: int, expand_k: float = 0.5, expand_v: float = 1.0, conv: int = 4):
        super().__init__()
        positive(dim=dim, conv=conv)
        keys, values = int(dim * expand_k), int(dim * expand_v)
        self.key_dim = head_dim(keys, heads, what="dim * expand_k")
        self.value_dim = head_dim(values, heads, what="dim * expand_v")
        self.widths = (keys, keys, values)
        self.qkv = Linear(dim, sum(self.widths), axes=("heads", "embed"), parts=self.widths)
        self.conv = ShortConv(sum(self.widths), conv)
        self.decay_in = Linear(dim, GATE_RANK, axes=(None, "embed"))
        self.decay_out = Linear(GATE_RANK, keys, axes=("heads", None), bias=True)
        self.gate = Linear(dim, values, axes=("heads", "embed"))
        self.norm = GatedRMSNorm(self.value_dim, axis=None)
        self.out = Linear(values, dim, axes=("embed", "heads"))
        self.recurrence = Diagonal("gla")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q, k, v = self.conv(self.qkv(x_BTD), seq, slot=slot).split(self.widths, dim=-1)
        q_BTHK, k_BTHK = (x.unflatten(-1, (-1, self.key_dim)) for x in (q, k))
        v_BTHV = v.unflatten(-1, (-1, self.value_dim))
        g_BTHK = F.logsigmoid(wide(self.decay_out(self.decay_in(x_BTD)))).unflatten(-1, (-1, self.key_dim))
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, g_BTHK / GATE_TEMPERATURE, slot=slot)
        gate_BTHV = self.gate(x_BTD).unflatten(-1, (-1, self.value_dim))
        return self.out(self.norm(o_BTHV, gate_BTHV).flatten(-2))
