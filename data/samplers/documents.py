"""The documents of a store, in order: the side that is trained on and the one that is held out."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data.samplers.index import BLOCK, IndexWriter, Ints, SamplerIndex, StoredDocuments, index
from data.samplers.permute import Permutation

VERSION = 1


class Documents:
    """Some documents of a store, end to end in an order that is not the store's; `len` is their tokens.

    side: train or heldout. A document is held out if its hash, as a fraction of 2^64, is below `heldout`: the same in
    every run, and the same for all copies of it. lengths: [least, below) tokens, None for no limit. `ids` int64 [N] are
    the documents, `edges` int64 [N + 1] where each begins in the row of them. Held-out ones stay in the store's order,
    so that an evaluation reads the same whatever is trained on.
    """

    def __init__(
        self, store: StoredDocuments, *, side: str, heldout: float, lengths: tuple[int, int | None] = (0, None)
    ) -> None:
        self.store = store
        self.spec: dict[str, Any] = {
            "documents": [VERSION, Permutation.version],
            "side": side,
            "heldout": heldout,
            "lengths": list(lengths),
        }
        if (cut := getattr(store, "cut", None)) is not None:  # `data.samplers.divided`
            self.spec["cut"] = list(cut)
        sampled = index(store, self.spec, self._write)
        self._index, self.ids, self.edges = sampled, sampled["ids"], sampled["edges"]

    def __len__(self) -> int:
        return int(self.edges[-1])

    def _write(self, writer: IndexWriter) -> None:
        count, (least, below) = len(self.store.hashes), self.spec["lengths"]
        limit, held = np.uint64(int(self.spec["heldout"] * 2**64)), self.spec["side"] == "heldout"
        order = Permutation(count, "documents") if not held and count else None
        total = 0
        writer.append("edges", [0])
        for first in range(0, count, BLOCK):
            ids = np.arange(first, min(first + BLOCK, count))
            ids = ids if order is None else order(ids)
            lengths = self.store.offsets[ids + 1] - self.store.offsets[ids]
            chosen = ((self.store.hashes[ids] < limit) == held) & (lengths >= max(least, 1))
            if below is not None:
                chosen &= lengths < below
            edges = total + np.cumsum(lengths[chosen])
            writer.append("ids", ids[chosen])
            writer.append("edges", edges)
            total = int(edges[-1]) if len(edges) else total

    def pieces(self, begin: int, end: int) -> Ints:
        """Tokens begin..end of the row, as pieces of documents: int64 [n, 2], [begin, end) in the store."""
        first = int(np.searchsorted(self.edges, begin, side="right")) - 1
        last = int(np.searchsorted(self.edges, end, side="left"))
        edges, begins = self.edges[first : last + 1], self.store.offsets[self.ids[first:last]]
        low = begins + np.maximum(begin - edges[:-1], 0)
        high = begins + np.minimum(end, edges[1:]) - edges[:-1]
        return np.stack([low, high], axis=1)

    def derived(self, spec: dict[str, Any], write: Callable[[IndexWriter], None]) -> SamplerIndex:
        """An index of the same documents, cut somehow."""
        return index(self.store, {**self.spec, **spec}, write)

    def blocks(self) -> Iterator[tuple[Ints, Ints]]:
        """(begins, lengths), int64 [n] each, of BLOCK documents at a time, in order."""
        for first in range(0, len(self.ids), BLOCK):
            ids = self.ids[first : first + BLOCK]
            begins = self.store.offsets[ids]
            yield begins, self.store.offsets[ids + 1] - begins
