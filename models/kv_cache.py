"""Keys and values that a span leaves to the next one: no more of them than a later query can see.

Legend: B rows, L tokens held, T tokens a span, G key/value heads, K key width, V value width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.pieces import Piece


class KVCache(NamedTuple):
    """k [B, L, G, K] and v [B, L, G, V], tokens one after the other, but for the first `sinks` places.

    Those hold the first tokens of each row's document in progress, where it may be too long to be held whole. While it
    is shorter than what follows them, they are not read and may be zeros.
    """

    k: Tensor
    v: Tensor
    sinks: int = 0

    def joined(self, k_BTGK: Tensor, v_BTGV: Tensor) -> "KVCache":
        """With a span's own keys and values behind."""
        return self._replace(k=torch.cat((self.k, k_BTGK), dim=1), v=torch.cat((self.v, v_BTGV), dim=1))

    def firsts(self, pieces: list[list[Piece]]) -> list[int] | None:
        """Finds, by row, the first token of the document that enters the span; None if before its other ones."""
        length = self.k.shape[1]
        pasts = [runs[0].past for runs in pieces]
        return [length - past if past <= length - self.sinks else 0 for past in pasts] if self.sinks else None

    def kept(self, pieces: list[list[Piece]], firsts: list[int] | None, window: int | None, sinks: int) -> "KVCache":
        """Selects the keys and values that the next span may need: `pieces` is the span at their end, entered with
        `firsts`."""
        length = self.k.shape[1]
        offset = length - pieces[0][-1].end
        begins = []  # by row, where the document that goes on begins
        for b, (begin, _, past) in enumerate(runs[-1] for runs in pieces):
            first = max(0, offset - past) if firsts is None else firsts[b]
            begins.append(offset + begin if begin else first)
        if window is None:
            oldest = min(begins)
            return KVCache(self.k[:, oldest:], self.v[:, oldest:])
        oldest = max(self.sinks, length - max(window - 1, sinks))
        k, v = self.k[:, oldest:], self.v[:, oldest:]
        if sinks:
            k, v = (
                torch.cat((_rows(whole, begins, sinks), recent), dim=1) for whole, recent in ((self.k, k), (self.v, v))
            )
        return KVCache(k, v, sinks)


def _rows(x_BLG: Tensor, begins: list[int], count: int) -> Tensor:
    """x[b, begins[b] : begins[b] + count] of each row, zeros where it ends before."""
    rows = [x[begin : begin + count] for x, begin in zip(x_BLG, begins, strict=True)]
    return torch.stack([F.pad(row, [0, 0, 0, 0, 0, count - row.shape[0]]) for row in rows])
