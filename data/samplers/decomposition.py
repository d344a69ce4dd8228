"""Decomposition buckets (2405.13226): a pool for each power of two, of where its sequences begin in the store."""

from functools import partial

import numpy as np

from data.samplers import decompose
from data.samplers.documents import Documents
from data.samplers.index import IndexWriter, Ints
from data.samplers.pool import Cut, Key, Pool


class Bucket(Pool):
    """Sequences of 2^k tokens, each out of one document."""

    version = decompose.VERSION

    def __init__(self, documents: Documents, length: int, begins: Ints) -> None:
        super().__init__(documents, length, len(begins), len(begins) * length)
        self._begins = begins

    def sequence(self, key: Key, number: int) -> Ints:
        begin = int(self._begins[number])
        return np.array([[begin, begin + self.length]])


def buckets(documents: Documents, cut: Cut) -> list[Pool]:
    """A pool for each length that there are sequences of, the shortest first. Raises ValueError if there are none."""
    low, high = cut.shortest.bit_length() - 1, cut.longest.bit_length() - 1
    spec = {"decomposition": decompose.VERSION, "low": low, "high": high, "overlong": cut.overlong}
    index = documents.derived(spec, partial(_write, documents, cut))
    pools = [Bucket(documents, 1 << k, begins) for k in range(low, high + 1) if len(begins := index[str(k)])]
    if not pools:
        raise ValueError(f"data.min_length={cut.shortest}: must be at most the length of some document")
    return list(pools)


def _write(documents: Documents, cut: Cut, writer: IndexWriter) -> None:
    low, high = cut.shortest.bit_length() - 1, cut.longest.bit_length() - 1
    for begins, lengths in documents.blocks():
        for k, part in decompose.split(begins, lengths, low, high, cut.overlong):
            writer.append(str(k), part)
