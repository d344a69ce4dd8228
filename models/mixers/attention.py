"""Softmax attention with grouped queries (2305.13245) and rotary positions (2104.09864)."""

from torch import Tensor, nn

from models.linear import Linear
from models.mixers.heads import head_dim
from models.rope import rotate
from models.sequence import Sequence


class Attention(nn.Module):
    """heads: query heads, which share out the model's `dim`, an even number of channels each. kv_heads: heads of keys
    and values, each for heads / kv_heads query heads; must divide `heads`. rope_base: base of the rotary frequencies; a
    larger one turns more slowly, for longer documents. Positions count from the start of each document.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(self, *, dim: int, heads: int, kv_heads: int, rope_base: float = 10_000.0):
        super().__init__()
        self.head_dim = head_dim(dim, heads)
        if self.head_dim % 2:
            raise ValueError(
                f"heads={heads}: dim={dim} gives an odd head dimension {self.head_dim}, rotary needs pairs"
            )
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads}: must divide heads={heads}")
        if rope_base <= 0:
            raise ValueError(f"rope_base={rope_base}: must be above 0")
        self.rope_base = rope_base
        self.q = Linear(dim, dim, axes=("heads", "embed"))
        self.kv = Linear(dim, 2 * kv_heads * self.head_dim, axes=("kv_heads", "embed"))
        self.out = Linear(dim, dim, axes=("embed", "heads"))

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK = self.q(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTGK, v_BTGK = self.kv(x_BTD).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        q_BTHK, k_BTGK = (rotate(x, seq.positions, self.rope_base) for x in (q_BTHK, k_BTGK))
        return self.out(seq.attend(q_BTHK, k_BTGK, v_BTGK, slot=slot).flatten(-2))
