"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1): keys and values of all heads are made of one
latent of few channels; a few more channels, alike for all heads, carry the positions.

The scores of a head are q·k + q_r·k_r with k = W_k c, c the latent. Since q·(W_k c) = (W_kᵀ q)·c, a head may as well
attend with W_kᵀ q to the latents themselves, and make its output of what it has read there: Σ p W_v c = W_v Σ p c.
So `absorb` chooses what is attended to, and what therefore travels between devices and is held for later tokens: one
head of latents, or keys and values of every head. Both give the same numbers. The latent is wider than a head, and a
pair of a query and a key costs more: 2 (2R + P) FLOPs a head for 2 (N + P + V).

Legend: B spans, T tokens, D model width, H heads, R latent width, N channels of a head without positions, P with, V of
values.
"""

import math

import torch
from torch import Tensor, nn

from models.axes import positive
from models.linear import Linear
from models.mixers import heads as sizes
from models.norm import RMSNorm, checked
from models.positions import Positions, RoPE, turn
from models.sequence import Sequence
from models.width import Units

ROPE = RoPE()


class MultiHeadLatentAttention(nn.Module):
    """heads: query heads. rank: channels of the latent that keys and values are made of; null for four times head_dim.
    head_dim: channels of a head's queries and keys that have no positions; null where the heads share out the model's
    `dim`. rope_dim: those that have, of which the keys' are the same for all heads; null for half of head_dim.
    value_dim: channels of a head's values; null for head_dim. query_rank: channels of a latent that queries are made
    of; null for none. absorb: true attends to the latents themselves, which then travel and are held in place of keys
    and values; false makes keys and values of them first, for fewer FLOPs. bias: true adds one to the two projections
    into the latents, and to the output. scale: factor of the scores; null for (head_dim + rope_dim)^-½. positions: the
    rule by which a token's place in its document enters, of `models.positions`. norm_eps: epsilon that the latents'
    norms add to the mean square.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        rank: int | None = None,
        head_dim: int | None = None,
        rope_dim: int | None = None,
        value_dim: int | None = None,
        query_rank: int | None = None,
        absorb: bool = True,
        bias: bool = False,
        scale: float | None = None,
        positions: Positions = ROPE,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        positive(dim=dim, heads=heads)
        width = sizes.head_dim(dim, heads) if head_dim is None else head_dim
        rope = max(2, width // 4 * 2) if rope_dim is None else rope_dim
        rank = 4 * width if rank is None else rank
        value = width if value_dim is None else value_dim
        positive(head_dim=width, rope_dim=rope, rank=rank, value_dim=value)
        if query_rank is not None:
            positive(query_rank=query_rank)
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"scale={scale}: must be above 0, or null for (head_dim + rope_dim)^-½")
        positions.frequencies(rope)  # refuses a width that it cannot rotate
        self.absorb, self.positions, self.rope = absorb, positions, rope
        self.split, self.made, self.latent = (width, rope), (width, value), (rank, rope)
        attended = rank if absorb else width
        # `attend` multiplies scores by the root of what it is given
        self.factor = math.sqrt(attended + rope) * ((width + rope) ** -0.5 if scale is None else scale)
        self.units: Units = {"heads": heads}
        checked(norm_eps)
        into = dim if query_rank is None else query_rank
        self.q_a = None if query_rank is None else Linear(dim, query_rank, axes=(None, "embed"), bias=bias)
        self.q_norm = nn.Identity() if query_rank is None else RMSNorm(into, eps=norm_eps, axis=None)
        self.q = Linear(into, heads * (width + rope), axes=("heads", "embed" if query_rank is None else None))
        self.kv_a = Linear(dim, rank + rope, axes=(None, "embed"), parts=self.latent, bias=bias)
        self.kv_norm = RMSNorm(rank, eps=norm_eps, axis=None)
        self.kv_b = Linear(rank, heads * (width + value), axes=("heads", None), parts=self.made)
        self.out = Linear(heads * value, dim, axes=("embed", "heads"), bias=bias)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        latent = x_BTD if self.q_a is None else self.q_norm(self.q_a(x_BTD))
        q_BTHN, q_BTHP = self.q(latent).unflatten(-1, (-1, sum(self.split))).split(self.split, dim=-1)
        c_BTR, k_BTP = self.kv_a(x_BTD).split(self.latent, dim=-1)
        c_BTR = self.kv_norm(c_BTR)
        rotation = self.positions.rotation(seq, self.rope)
        q_BTHP, k_BT1P = turn(q_BTHP, *rotation), turn(k_BTP.unsqueeze(2), *rotation)
        attend = self._latents if self.absorb else self._heads
        y_BTD: Tensor = self.out(attend(q_BTHN, q_BTHP, c_BTR, k_BT1P, seq, slot).flatten(-2))
        return y_BTD

    def _latents(
        self, q_BTHN: Tensor, q_BTHP: Tensor, c_BTR: Tensor, k_BT1P: Tensor, seq: Sequence, slot: str
    ) -> Tensor:
        """The reads of each head among the latents, [B, T, H, V]."""
        weight = self.kv_b.weight.to(c_BTR.dtype).unflatten(0, (-1, sum(self.made)))
        k_HNR, v_HVR = weight.split(self.made, dim=1)
        q_BTHK = torch.cat((torch.einsum("bthn,hnr->bthr", q_BTHN, k_HNR), q_BTHP), dim=-1)
        k_BT1K = torch.cat((c_BTR.unsqueeze(2), k_BT1P), dim=-1)
        c_BT1R = k_BT1K[..., : c_BTR.shape[-1]]
        o_BTHR = seq.attend(q_BTHK * self.factor, k_BT1K, c_BT1R, slot=slot, values_in_keys=True)
        return torch.einsum("bthr,hvr->bthv", o_BTHR, v_HVR)

    def _heads(self, q_BTHN: Tensor, q_BTHP: Tensor, c_BTR: Tensor, k_BT1P: Tensor, seq: Sequence, slot: str) -> Tensor:
        """The same among keys and values, which are made of the latents first."""
        k_BTHN, v_BTHV = self.kv_b(c_BTR).unflatten(-1, (-1, sum(self.made))).split(self.made, dim=-1)
        k_BTHK = torch.cat((k_BTHN, k_BT1P.expand(-1, -1, k_BTHN.shape[2], -1)), dim=-1)
        return seq.attend(torch.cat((q_BTHN, q_BTHP), dim=-1) * self.factor, k_BTHK, v_BTHV, slot=slot)
