"""Softmax attention with grouped queries (2305.13245) and rotary positions (2104.09864), over all of a document or a
window of it.

The norm of queries and keys is Qwen3's (2505.09388), the gate on the output Qwen3-Next's (2505.06708).
"""

from torch import Tensor, nn

from models.axes import positive
from models.linear import Linear
from models.mixers import heads as sizes
from models.norm import RMSNorm, checked
from models.positions import Positions, RoPE, turn
from models.sequence import Sequence
from models.width import Units

ROPE = RoPE()

WIDEST = 1 << 16  # of a head: positions are worked out for half as many frequencies


class Attention(nn.Module):
    """heads: query heads. kv_heads: heads of keys and values, each for heads / kv_heads query heads; must divide
    `heads`, null for as many. head_dim: channels of a head; null where the heads share out the model's `dim`.
    window: number of tokens that a query sees, itself included; null for the whole document. sinks: number of the
    document's first tokens that remain in sight beyond the window (LM-Infinite 2308.16137, StreamingLLM 2309.17453).
    qk_norm: true normalises each head's queries and keys before they are rotated. gate: true multiplies each
    channel of the output by a sigmoid of the input. positions: the rule by which a token's place in its
    document enters, of `models.positions`. norm_eps: epsilon that the norms of queries and keys add to the mean square.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        qk_norm: bool = False,
        gate: bool = False,
        positions: Positions = ROPE,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        positive(dim=dim, heads=heads)
        self.head_dim = sizes.head_dim(dim, heads) if head_dim is None else head_dim
        positive(head_dim=self.head_dim, window=1 if window is None else window)
        if self.head_dim > WIDEST:
            raise ValueError(f"head_dim={self.head_dim}: must be at most {WIDEST:,}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads}: must divide heads={heads}")
        if sinks < 0 or sinks and window is None:
            raise ValueError(f"sinks={sinks}: must be 0 without a window, else at least 0")
        positions.frequencies(self.head_dim)  # refuses a width that it cannot rotate
        self.window, self.sinks, self.positions = window, sinks, positions
        self.units: Units = {"heads": heads, "kv_heads": kv_heads}
        width = heads * self.head_dim
        self.q = Linear(dim, width, axes=("heads", "embed"))
        self.kv = Linear(dim, 2 * kv_heads * self.head_dim, axes=("kv_heads", "embed"), parts=2 * (self.head_dim,))
        self.q_norm = RMSNorm(self.head_dim, eps=checked(norm_eps), axis=None) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps, axis=None) if qk_norm else nn.Identity()
        self.gate = Linear(dim, width, axes=("heads", "embed")) if gate else None
        self.out = Linear(width, dim, axes=("embed", "heads"))

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK = self.q_norm(self.q(x_BTD).unflatten(-1, (-1, self.head_dim)))
        k_BTGK, v_BTGK = self.kv(x_BTD).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        rotation = self.positions.rotation(seq, self.head_dim)
        q_BTHK, k_BTGK = turn(q_BTHK, *rotation), turn(self.k_norm(k_BTGK), *rotation)
        o_BTD = seq.attend(q_BTHK, k_BTGK, v_BTGK, slot=slot, window=self.window, sinks=self.sinks).flatten(-2)
        return self.out(o_BTD if self.gate is None else o_BTD * self.gate(x_BTD).sigmoid())
