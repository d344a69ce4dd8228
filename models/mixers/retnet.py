"""Retention (Sun et al. 2023, 2307.08621): linear attention whose heads forget at fixed rates, 1 - 2^(-5-h) a token.

Queries and keys are rotated by their position in the document (the paper's e^{inθ}). The paper's division by
max(|Σ scores|, 1) is left out, as in flash-linear-attention: the norm of each head takes the scale away.
"""

import torch
from torch import Tensor

from models.linear import Linear
from models.mixers.qkv import QKVMixer
from models.norm import GatedRMSNorm, checked
from models.positions import rotate
from models.precision import wide
from models.recurrence import Scalar
from models.sequence import Sequence
from models.width import UNDIVIDED, Width


class RetNet(QKVMixer):
    """A head's state is a matrix of dim * expand_k / heads by dim * expand_v / heads numbers, `dim` the model's.

    heads: number of heads, each forgetting half as fast as the one before; must divide dim * expand_k into even parts,
    and dim * expand_v. expand_k: width of the keys of all heads together, and of the queries, in multiples of dim.
    expand_v: width of the values of all heads together, in multiples of dim. rope_base: base of the rotary frequencies
    of queries and keys. norm_eps: epsilon that the norm of a head's output adds to its mean square.

    x [B, T, D] -> [B, T, D].
    """

    INHERITS = True

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope_base: float = 10_000.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__(dim=dim, heads=heads, expand_k=expand_k, expand_v=expand_v)
        if self.key_dim % 2:
            raise ValueError(
                f"heads={heads}: must divide dim * expand_k={self.keys} into even parts, rotary needs pairs"
            )
        if rope_base <= 0:
            raise ValueError(f"rope_base={rope_base}: must be above 0")
        self.rope_base, self.heads = rope_base, heads
        self.width: Width = UNDIVIDED
        self.gate = Linear(dim, self.values, axes=("heads", "embed"))
        self.norm = GatedRMSNorm(self.value_dim, eps=checked(norm_eps), axis=None)
        self.out = Linear(self.values, dim, axes=("embed", "heads"))
        self.recurrence = Scalar("simple_gla")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD, seq, slot=slot)
        q_BTHK, k_BTHK = (rotate(x, seq.positions, self.rope_base) for x in (q_BTHK, k_BTHK))
        g_BTH = log_decays(v_BTHV, *self.width.span(self.heads)).expand(v_BTHV.shape[:3])
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, g_BTH, slot=slot)
        return self.output(o_BTHV, self.gate(x_BTD))


def log_decays(like_BTHV: Tensor, begin: int, end: int) -> Tensor:
    """log(1 - 2^(-5-h)) [H] of heads [begin, end), worked out in fp64: in fp32 the plain formula is exactly 0 from
    head 20 on."""
    h = torch.arange(begin, end, device=like_BTHV.device, dtype=torch.float64)
    return torch.log1p(-(2 ** (-5 - h))).to(wide(like_BTHV[:0]).dtype)
