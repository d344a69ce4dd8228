"""Concat-and-chunk: documents end to end, cut every so many tokens whatever they hold.

The row of documents is a ring. An epoch begins its cuts somewhere else on it, so that the next epoch's chunks are
others; fewer tokens than a chunk are left over, other ones each time.
"""

from typing import Any

import numpy as np

from data.samplers.documents import Documents
from data.samplers.index import Ints
from data.samplers.permute import number
from data.samplers.pool import Cut, Key, Pool


class DocumentChunks(Pool):
    """Chunks of a row of documents."""

    def __init__(self, documents: Documents, length: int) -> None:
        super().__init__(documents, length, count := len(documents) // length, count * length)

    def sequence(self, key: Key, number_: int) -> Ints:
        total = len(self.documents)
        begin = (number(total, *key, "begin") + number_ * self.length) % total
        end = begin + self.length
        if end <= total:
            return self.documents.pieces(begin, end)
        return np.concatenate([self.documents.pieces(begin, total), self.documents.pieces(0, end - total)])


def chunks(documents: Documents, cut: Cut) -> list[Pool]:
    """One pool. Raises ValueError if the documents do not fill a chunk."""
    too_few(documents, cut.longest, len(documents) // cut.longest)
    return [DocumentChunks(documents, cut.longest)]


def too_few(documents: Documents, length: int, total: Any) -> None:
    if not total:
        raise ValueError(
            f"data.max_length={length}: {len(documents.ids)} documents, {len(documents)} tokens together, "
            f"do not fill one sequence; must be at most {len(documents)}"
        )
