"""Packing: how documents of every length become sequences of one length.

`Windows` is concat-and-chunk. One epoch lays the documents end to end in an order keyed by (seed, epoch), cuts windows
of `max_length` tokens, and visits the windows in a second keyed order, so that a long document is not met in a run.

Orders come from the raw bits of a counter-based generator (Philox: Salmon et al., SC 2011), sorted: NumPy keeps a bit
generator's stream for ever, but not what `Generator.permutation` makes of it, and a run may outlive a NumPy.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.store import Store

NO_TARGET = -100


@dataclass(frozen=True, eq=False)
class Packed:
    """One packed sequence of L tokens, holding pieces of documents.

    tokens int64 [L]; targets int64 [L], the token to predict at each place, `NO_TARGET` = -100 where there is none;
    starts bool [L], True where a piece begins. starts[0] is always True.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    starts: NDArray[np.bool_]

    @property
    def positions(self) -> NDArray[np.int64]:
        """int64 [L]: how many tokens of its piece come before each token."""
        places = np.arange(len(self.tokens))
        return places - np.maximum.accumulate(np.where(self.starts, places, 0))

    @property
    def num_targets(self) -> int:
        """How many tokens have a target."""
        return int(np.count_nonzero(self.targets != NO_TARGET))


class Stream:
    """Documents of a store, laid end to end in the order given by `documents`, int64 [N]."""

    def __init__(self, store: Store, documents: NDArray[np.int64]) -> None:
        self.store = store
        self.begins = store.offsets[documents]
        self.edges = np.concatenate([[0], np.cumsum(store.offsets[documents + 1] - self.begins)])

    def __len__(self) -> int:
        """Tokens in the stream."""
        return int(self.edges[-1])

    def cut(self, begin: int, length: int) -> Packed:
        """Tokens begin..begin+length, each with the next token of the stream as its target."""
        end = begin + length + 1
        first = int(np.searchsorted(self.edges, begin, side="right")) - 1
        last = int(np.searchsorted(self.edges, end, side="left"))
        edges, begins = self.edges[first : last + 1], self.begins[first:last]
        low = begins + np.maximum(begin - edges[:-1], 0)
        high = begins + np.minimum(end, edges[1:]) - edges[:-1]
        pieces = [self.store.tokens[a:b] for a, b in zip(low, high, strict=True)]
        tokens = np.concatenate(pieces).astype(np.int64)
        starts = np.zeros(length + 1, dtype=bool)
        starts[0] = True
        starts[edges[1:-1] - begin] = True
        return Packed(tokens=tokens[:-1], targets=tokens[1:].copy(), starts=starts[:-1])


class Windows:
    """Windows of `max_length` tokens over some documents of a store; `len` is the number of windows in an epoch.

    An epoch's tail shorter than a window is dropped, so that every epoch has the same number of windows. Raises
    ValueError if the documents do not fill one window.
    """

    name = "windows"
    version = 1

    def __init__(self, store: Store, documents: NDArray[np.int64], max_length: int) -> None:
        self.store = store
        self.documents = documents
        self.max_length = max_length
        self._natural = Stream(store, self.documents)
        self._epochs: dict[tuple[int, int], tuple[Stream, NDArray[np.int64]]] = {}
        if len(self) < 1:
            raise ValueError(
                f"data.max_length={max_length}: {len(self.documents)} documents, {len(self._natural)} tokens together, "
                f"do not fill one window; at most {len(self._natural) - 1} fits"
            )

    def __len__(self) -> int:
        return (len(self._natural) - 1) // self.max_length  # one token more than a window: the last target

    def window(self, seed: int, index: int) -> Packed:
        """Window `index` of the endless sequence of epochs of `seed`: a pure function of both."""
        epoch, place = divmod(index, len(self))
        stream, order = self._epoch(seed, epoch)
        return stream.cut(int(order[place]) * self.max_length, self.max_length)

    def natural(self, index: int) -> Packed:
        """Window `index` < len of the documents in the order they were given."""
        return self._natural.cut(index * self.max_length, self.max_length)

    def _epoch(self, seed: int, epoch: int) -> tuple[Stream, NDArray[np.int64]]:
        known = self._epochs.get((seed, epoch))
        if known is None:
            documents = self.documents[_order(len(self.documents), seed, epoch, 0)]
            known = Stream(self.store, documents), _order(len(self), seed, epoch, 1)
            newest = list(self._epochs.items())[-1:]  # a batch may straddle two epochs, never more at a time
            self._epochs = dict([*newest, ((seed, epoch), known)])
        return known


def _order(count: int, seed: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1, int64 [count], keyed by (seed, *key)."""
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))
    return np.argsort(bits.random_raw(count), kind="stable")
