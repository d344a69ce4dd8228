"""Causal softmax attention over packed documents: one scaled_dot_product_attention per run of a document's tokens.

No mask over the packed sequence is ever built, so the work is that of the documents and not of their concatenation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Piece(NamedTuple):
    """A run [begin, end) of one document's tokens within a span; `past` of its tokens came before the span."""

    begin: int
    end: int
    past: int


def pieces_of(positions_BT: Tensor) -> list[list[Piece]]:
    """The runs of each span, from positions within documents (0 starts a document)."""
    rows = []
    for positions in positions_BT.tolist():
        begins = [0, *(t for t in range(1, len(positions)) if positions[t] == 0)]
        ends = [*begins[1:], len(positions)]
        rows.append([Piece(b, e, positions[b]) for b, e in zip(begins, ends, strict=True)])
    return rows


def attend_pieces(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, pieces: list[list[Piece]], offsets: list[int]
) -> Tensor:
    """Attention of each run to its own document's keys up to and including each query. -> [B, T, H, V] in q's dtype.

    `offsets[b]` is the index on the key axis S of span b's first token. Scale is K^-½; G divides H.
    """
    rows = []
    for b, (runs, offset) in enumerate(zip(pieces, offsets, strict=True)):
        outs = []
        for begin, end, past in runs:
            q = q_BTHK[b : b + 1, begin:end].transpose(1, 2)
            keys = slice(offset + begin - past, offset + end)
            k, v = k_BSGK[b : b + 1, keys].transpose(1, 2), v_BSGV[b : b + 1, keys].transpose(1, 2)
            outs.append(_attend(q, k, v, past).transpose(1, 2))
        rows.append(torch.cat(outs, dim=1))
    return torch.cat(rows, dim=0)


def _attend(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=grouped)
