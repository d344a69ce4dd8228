"""A packed sequence, and how it is read: pieces of documents of a store, end to end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.samplers.index import Ints, StoredDocuments

NO_TARGET = -100


class PieceOrigin(NamedTuple):
    """The place of a piece in its batch: the packed sequence, which of its pieces, and the first token there."""

    sequence: int
    piece: int
    begin: int


@dataclass(frozen=True, eq=False)
class Packed:
    """One packed sequence of L tokens, holding pieces of documents.

    tokens int64 [L]; targets int64 [L], the token to predict at each place, `NO_TARGET` = -100 where there is none;
    starts bool [L], True where a piece begins. starts[0] is always True. padding: how many of the tokens, the last
    ones, only fill a place: no statistic may count them. origin: of a piece that became a sequence of its own
    (`unpacked`), None elsewhere.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    starts: NDArray[np.bool_]
    padding: int = 0
    origin: PieceOrigin | None = None

    @property
    def counted(self) -> NDArray[np.bool_]:
        """bool [L], False for padding."""
        return np.arange(len(self.tokens)) < self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Counts the tokens that are no padding."""
        return len(self.tokens) - self.padding

    @property
    def positions(self) -> NDArray[np.int64]:
        """int64 [L]: how many tokens of its piece come before each token."""
        places = np.arange(len(self.tokens))
        return places - np.maximum.accumulate(np.where(self.starts, places, 0))

    @property
    def num_targets(self) -> int:
        """Counts the tokens that have a target."""
        return int(np.count_nonzero(self.targets != NO_TARGET))


def read(store: StoredDocuments, pieces: Ints, length: int, *, document: int, masked: bool = True) -> Packed:
    """A sequence of `length` tokens of the store's pieces [n, 2], each [begin, end) inside a document.

    A token's target is the one after it in its document; that of a document's last is `document`, the token that opens
    the next, and none in a store where documents do not open with what closes others, or where the rest of the document
    is held out (`data.samplers.divided`). What the pieces do not fill is padding: a piece of its own, of `document` and
    without targets. Not `masked`: all but the padding is one piece, and every token sees what stands before it.
    """
    tokens = np.full(length, document, dtype=np.int64)
    targets = np.full(length, NO_TARGET, dtype=np.int64)
    starts = np.zeros(length, dtype=bool)
    ends = pieces[:, 1]
    last = document if getattr(store, "opened", True) else NO_TARGET
    cuts: frozenset[int] = getattr(store, "cuts", frozenset())
    closing = store.offsets[np.searchsorted(store.offsets, ends)] == ends
    at = 0
    for (begin, end), closes in zip(pieces.tolist(), closing.tolist(), strict=True):
        held, behind = end - begin, at + end - begin
        tokens[at:behind] = store.tokens[begin:end]
        targets[at : behind - 1] = tokens[at + 1 : behind]
        targets[behind - 1] = (NO_TARGET if end in cuts else last) if closes else store.tokens[end]
        starts[at] = masked or at == 0
        at += held
    starts[at : at + 1] = True
    starts[0] = True
    return Packed(tokens=tokens, targets=targets, starts=starts, padding=length - at)


def unpacked(batch: Sequence[Packed]) -> list[Packed]:
    """Makes a sequence of its own of every piece of a batch, in order, and leaves out padding.

    No token sees another piece, so the loss and every gradient stay the same, and a planner may place pieces apart. A
    piece remembers its `origin`, by which random choices know it. The windows of a batch whose documents see each other
    are one piece each.
    """
    documents = []
    for sequence, window in enumerate(batch):
        edges = [*np.flatnonzero(window.starts[: window.num_tokens]).tolist(), window.num_tokens]
        for piece, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
            starts = np.zeros(end - begin, dtype=bool)
            starts[0] = True
            origin = PieceOrigin(sequence, piece, begin)
            documents.append(
                Packed(tokens=window.tokens[begin:end], targets=window.targets[begin:end], starts=starts, origin=origin)
            )
    return documents
