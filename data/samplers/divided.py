"""A store of so few documents that no whole one can be held out, or none is left to train on: a part of one is.

The longest document is cut once, at a place that depends on the store and on data.heldout alone: its begin is trained
on, its end is held out, and so it is for every copy of it. Lengths of sequences have no say, so that the stages of a
run whose lengths grow hold out the same text.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.samplers.index import Ints, StoredDocuments

FEW = 128  # documents: of more, data.heldout can be chosen so that some are held out


class Divided:
    """A store one of whose documents is two: `StoredDocuments`, and what else a store has.

    cut: (the document, how many of its tokens are trained on). cuts: where in the tokens the two meet, of every copy:
    there the begin does not know what follows, which is held out.
    """

    def __init__(self, store: Any, document: int, train: int) -> None:
        self.whole, self.cut = store, (document, train)
        copies = np.flatnonzero(store.hashes == store.hashes[document])
        self.cuts = frozenset((store.offsets[copies] + train).tolist())
        self.offsets: Ints = np.insert(store.offsets, copies + 1, store.offsets[copies] + train)
        hashes = np.array(store.hashes)
        hashes[copies] = 0
        self.hashes: NDArray[np.uint64] = np.insert(hashes, copies, np.iinfo(np.uint64).max)

    def __getattr__(self, name: str) -> Any:
        if name in ("whole", "cut"):  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Divided, (self.whole, *self.cut)

    def __len__(self) -> int:
        return len(self.hashes)

    def document(self, index: int) -> NDArray[np.integer]:
        """Document `index`, of which the two parts of the one that is cut are two."""
        return self.whole.tokens[self.offsets[index] : self.offsets[index + 1]]


def divided(store: StoredDocuments, heldout: float) -> Any:
    """The store, as it is or `Divided` where it needs that: one of fewer than `FEW` documents, all on one side."""
    count = len(store.hashes)
    if not 0 < count < FEW:
        return store
    held = np.asarray(store.hashes) < np.uint64(int(heldout * 2**64))
    if held.any() and not held.all():
        return store
    lengths = np.diff(store.offsets)
    longest, total = int(lengths.argmax()), int(lengths.sum())
    share = heldout if not held.any() else 1 - heldout  # of all tokens, on the side that has none
    length = min(max(math.ceil(share * total), 2), int(lengths[longest]) - 2)
    if length < 2:
        return store
    return Divided(store, longest, int(lengths[longest]) - length if not held.any() else length)
