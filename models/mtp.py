"""Multi-token prediction: beside the next token, a model learns to predict those after it (DeepSeek-V3, 2412.19437,
section 2.2).

Module k (from 1) takes the normalised stream of module k - 1, which for k = 1 is the model's own, and the embedding of
the token k places ahead; a projection joins the two, and one more block follows. The model's embedding and head serve
all modules. Module k at token i has seen the tokens up to i + k, and predicts token i + k + 1.

Which token lies k places ahead is known before a sequence is cut into spans and given to ranks, and only then: `Ahead`
has it from whoever placed the sequence. Where a document has ended there is none: the embedding is zero, there is no
target, and no statistic counts the place. Causal layers let nothing of it reach a place that has a target.

Legend: M modules, B spans, T tokens, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.linear import Linear
from models.moe import Routing
from models.norm import NormKind, norm_of
from models.sequence import Sequence


class Ahead(NamedTuple):
    """The tokens that lie ahead in each token's document, for modules 1 to M.

    tokens: [M, B, T] int64, the token that many places ahead, -1 where the document has ended. targets: [M, B, T]
    int64, the one after it, -100 for none.
    """

    tokens: Tensor
    targets: Tensor


class MTPModule(nn.Module):
    """One module: norms of its two inputs, the projection [D, 2 D] of both side by side, the embedding first as in
    released weights, a block, and a norm before the shared head.

    block: a `models.Block` that takes nothing from other layers.

    hidden [B, T, D], embedded [B, T, D] -> the normalised stream [B, T, D], and where a mixture of experts sent its
    tokens.
    """

    def __init__(self, *, dim: int, block: nn.Module, norm: NormKind = "rms", norm_eps: float = 1e-5):
        super().__init__()
        make = norm_of(norm)
        self.embedding_norm, self.hidden_norm = make(dim, eps=norm_eps), make(dim, eps=norm_eps)
        self.join = Linear(2 * dim, dim, axes=("embed", "embed"))
        self.block = block
        self.norm = make(dim, eps=norm_eps)

    def forward(self, hidden_BTD: Tensor, seq: Sequence, embedded_BTD: Tensor) -> tuple[Tensor, Routing | None]:
        both_BTE = torch.cat((self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)), dim=-1)
        x_BTD, routing, _ = self.block(self.join(both_BTE), seq)
        return self.norm(x_BTD).clone(), routing  # sharding must not be handed a view
