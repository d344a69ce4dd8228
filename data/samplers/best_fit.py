"""Best-fit packing (2404.10830): documents stay whole where they fit, several to a sequence.

A document longer than a sequence is cut into full ones and a rest. Pieces are then packed longest first, each into the
sequence that it leaves the least room in (best-fit decreasing), among the documents of one window of the row: so what
is held in memory is a window. What a sequence has room for beyond its pieces is padding.
"""

from functools import partial

import numpy as np

from data.samplers.documents import Documents
from data.samplers.index import IndexWriter, Ints
from data.samplers.pool import Cut, Key, Pool


def best_fit(lengths: Ints, capacity: int) -> Ints:
    """Assigns each piece of 1..capacity tokens to a bin, int64 [n]; bins are numbered from 0 as they are opened.

    Best-fit decreasing. The rooms that open bins have are the bits of one number, so the smallest that is large enough
    is found by a shift.
    """
    bin_of = np.empty(len(lengths), dtype=np.int64)
    open_: dict[int, list[int]] = {}
    rooms, opened = 0, 0
    order = np.argsort(-lengths, kind="stable")
    for piece, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
        large = rooms >> size
        if large:
            room = size + (large & -large).bit_length() - 1
            bin_ = open_[room].pop()
            if not open_[room]:
                rooms ^= 1 << room
        else:
            room, bin_ = capacity, opened
            opened += 1
        bin_of[piece] = bin_
        if left := room - size:
            if not open_.setdefault(left, []):
                rooms |= 1 << left
            open_[left].append(bin_)
    return bin_of


def split(begins: Ints, lengths: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Documents cut into pieces of at most `capacity` tokens: where they begin, and their lengths, int64 [m] each."""
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = nth * capacity
    return begins[document] + at, np.minimum(lengths[document] - at, capacity)


class Bins(Pool):
    """The sequences that best-fit packing makes of documents."""

    version = 1

    def __init__(self, documents: Documents, length: int) -> None:
        spec = {"best_fit": self.version, "length": length}
        index = documents.derived(spec, partial(self._write, documents, length))
        self._begins, self._ends, self._edges = index["begins"], index["ends"], index["edges"]
        super().__init__(documents, length, len(self._edges) - 1, len(documents))

    @staticmethod
    def _write(documents: Documents, length: int, writer: IndexWriter) -> None:
        writer.append("edges", [0])
        written = 0
        for block in documents.blocks():
            begins, lengths = split(block[0], block[1], length)
            order = np.argsort(bin_of := best_fit(lengths, length), kind="stable")
            writer.append("begins", begins[order])
            writer.append("ends", (begins + lengths)[order])
            writer.append("edges", written + np.cumsum(np.bincount(bin_of)))
            written += len(order)

    def sequence(self, key: Key, number: int) -> Ints:
        first, last = self._edges[number : number + 2]
        return np.stack([self._begins[first:last], self._ends[first:last]], axis=1)


def bins(documents: Documents, cut: Cut) -> list[Pool]:
    """One pool."""
    return [Bins(documents, cut.longest)]
