"""The language model: embedding, a pattern of blocks, and a head over the vocabulary."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import declare, normal
from models.block import Factory
from models.ffn import Aux
from models.linear import Linear
from models.norm import RMSNorm
from models.pattern import unroll
from models.sequence import Sequence


class Output(NamedTuple):
    logits: Tensor  # [B, T, vocabulary]
    aux: dict[str, Aux]  # by layer name, for layers whose feed-forward reports something


class LM(nn.Module):
    """Decoder-only language model over `blocks`, a vocabulary of block factories laid out by `pattern`.

    tokens [B, T] int64 -> Output. Activations are in `compute` dtype (an attribute, fp32 unless set); the logits too.
    """

    def __init__(self, *, vocabulary: int, dim: int, layers: int, pattern: list[str], blocks: Mapping[str, Factory]):
        super().__init__()
        self.compute = torch.float32
        self.embedding = declare(vocabulary, dim, axes=("vocab", "embed"), init=normal(1.0))
        names = unroll(pattern, layers, list(blocks))
        self.layers = nn.ModuleDict({str(i): blocks[n](dim=dim, slot=f"layers.{i}") for i, n in enumerate(names)})
        self.norm = RMSNorm(dim)
        self.head = Linear(dim, vocabulary, axes=("vocab", "embed"))

    def forward(self, tokens_BT: Tensor, seq: Sequence) -> Output:
        x_BTD = F.embedding(tokens_BT, self.embedding).to(self.compute)
        aux = {}
        for name, block in self.layers.items():
            x_BTD, said = block(x_BTD, seq)
            if said:
                aux[f"layers.{name}"] = said
        return Output(self.head(self.norm(x_BTD)), aux)
