"""DeepSeek Sparse Attention (DeepSeek-V3.2, 2512.02556, section 2): softmax attention to a few keys that a light index
selects, here over grouped keys and values.

The index has queries of a few heads, one key a token, and a weight a head; its keys have a LayerNorm and, like its
queries, rotary positions. It reads the layer's input as a constant and learns by its own loss alone
(`models.kernels.indexed_attention`), so that the rest of the model learns as if the selection were given.

What travels between devices is keys, values and the index's keys of every token: the choice is made where the query is.
"""

from typing import Literal, get_args

from torch import Tensor, nn

from models.axes import positive
from models.kernels.indexed_attention import Index, joined
from models.linear import Linear
from models.mixers import heads as sizes
from models.norm import LayerNorm, RMSNorm, checked
from models.positions import Positions, RoPE
from models.sequence import Sequence
from models.width import Units

ROPE = RoPE()
Stage = Literal["dense", "sparse"]


class DeepSeekSparseAttention(nn.Module):
    """heads: query heads. kv_heads: heads of keys and values, each for heads / kv_heads query heads; must divide
    `heads`, null for as many. head_dim: channels of a head; null where the heads share out the model's `dim`. top_k:
    keys that a query attends to, its own a candidate like any other; shorter documents are seen whole. index_heads:
    heads of the index. index_dim: channels of its queries and of its keys. stage: dense attends to all keys while the
    index learns what they get; sparse attends to those that it selects. qk_norm: true normalises queries and keys of
    attention, every head by itself, before they are rotated. gate: true multiplies each channel of the output by a
    sigmoid of the input. positions: the rule by which a token's place in its document enters, of `models.positions`, in
    the index too. norm_eps: epsilon that the norms add to the mean square or the variance.

    The index's loss enters training with the weight train.index_weight.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        top_k: int = 2048,
        index_heads: int = 4,
        index_dim: int = 32,
        stage: Stage = "sparse",
        qk_norm: bool = False,
        gate: bool = False,
        positions: Positions = ROPE,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        positive(dim=dim, heads=heads)
        self.head_dim = sizes.head_dim(dim, heads) if head_dim is None else head_dim
        positive(head_dim=self.head_dim, top_k=top_k, index_heads=index_heads, index_dim=index_dim)
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads}: must divide heads={heads}")
        if stage not in get_args(Stage):
            raise ValueError(f"stage={stage}: must be one of {', '.join(get_args(Stage))}")
        for width in (self.head_dim, index_dim):
            positions.frequencies(width)  # refuses a width that it cannot rotate
        self.units: Units = {"heads": 1, "kv_heads": 1}  # the index's loss asks for the mean over all heads
        self.positions, self.top_k, self.dense = positions, top_k, stage == "dense"
        width, kv_width = heads * self.head_dim, kv_heads * self.head_dim
        self.q = Linear(dim, width, axes=("heads", "embed"))
        self.kv = Linear(dim, 2 * kv_width, axes=("kv_heads", "embed"), parts=2 * (self.head_dim,))
        checked(norm_eps)
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps, axis=None) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps, axis=None) if qk_norm else nn.Identity()
        self.gate = Linear(dim, width, axes=("heads", "embed")) if gate else None
        self.out = Linear(width, dim, axes=("embed", "heads"))
        self.index_dim = index_dim
        self.index_q = Linear(dim, index_heads * index_dim, axes=(None, "embed"))
        self.index_k = Linear(dim, index_dim, axes=(None, "embed"))
        self.index_norm = LayerNorm(index_dim, eps=norm_eps)
        self.index_weights = Linear(dim, index_heads, axes=(None, "embed"))

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK = self.q_norm(self.q(x_BTD).unflatten(-1, (-1, self.head_dim)))
        k_BTGK, v_BTGK = self.kv(x_BTD).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        q_BTHK, k_BTGK = self.positions.turned(q_BTHK, self.k_norm(k_BTGK), seq)
        o_BTHK, loss_BT = seq.attend_selected(q_BTHK, k_BTGK, v_BTGK, self._index(x_BTD.detach(), seq), slot=slot)
        o_BTD = o_BTHK.flatten(-2)
        y_BTD: Tensor = self.out(o_BTD if self.gate is None else o_BTD * self.gate(x_BTD).sigmoid())
        if seq.decoding:
            return y_BTD
        loss = (loss_BT * seq.counted).sum()
        seq.index_losses.add(loss)
        return joined(y_BTD, loss, seq.index_losses.weight)

    def _index(self, x_BTD: Tensor, seq: Sequence) -> Index:
        q_BTJI = self.index_q(x_BTD).unflatten(-1, (-1, self.index_dim))
        k_BT1I = self.index_norm(self.index_k(x_BTD)).unsqueeze(2)
        q_BTJI, k_BT1I = self.positions.turned(q_BTJI, k_BT1I, seq)
        weights_BTJ = self.index_weights(x_BTD) * q_BTJI[0, 0].numel() ** -0.5
        return Index(q_BTJI, weights_BTJ, k_BT1I.squeeze(2), self.top_k, self.dense)
