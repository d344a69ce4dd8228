"""Baselines by counting alone: byte n-gram models, the bar that a trained model has to clear.

Interpolated Witten-Bell smoothing (Witten and Bell 1991; Chen and Goodman 1998, section 2.4), down to the uniform
distribution over the 256 bytes. For a context h seen c(h) times with t(h) distinct bytes after it,

    p(w | h) = (c(h w) + t(h) p(w | h')) / (c(h) + t(h)),        h' = h without its oldest symbol,

and p(w | h) = p(w | h') where h was never seen. Contexts are integers in base 257 (DOCUMENT is a symbol of contexts,
never a byte to predict), so that counting is sorting.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from data.pack import NO_TARGET, Packed
from data.tokenizer import Bytes

BASE = Bytes.size
LONGEST = 6  # symbols of context: with the byte after them, 257^7 is the last power that fits in 63 bits


def ngram_losses(
    train: Iterable[Packed], heldout: Iterable[Packed], orders: tuple[int, ...] = (0, 1, 4)
) -> dict[int, float]:
    """Loss of n-gram models of the bytes, in nats per byte, by length of context in `orders`.

    Counts on `train` and scores on `heldout` the targets that are bytes. A context never reaches back over the start
    of its piece: where it would, the next shorter model stands in. Raises ValueError for an order not in 0..6, and if
    nothing is to be scored.
    """
    if not all(0 <= order <= LONGEST for order in orders):
        raise ValueError(f"orders={orders}: expected lengths of context from 0 to {LONGEST}")
    counted, scored = _Examples(train), _Examples(heldout)
    if not len(scored.nexts):
        raise ValueError("the held-out windows have no byte to score")
    losses = {}
    p = np.full(len(scored.nexts), 1 / 256)
    for order in range(max(orders) + 1):
        has_context, contexts, nexts = scored.of(order)
        p[has_context] = _interpolate(*counted.of(order)[1:], contexts, nexts, p[has_context])
        losses[order] = float(-np.log(p).mean())
    return {order: losses[order] for order in orders}


class _Examples:
    """The bytes to predict of some sequences, each with its contexts of any length."""

    def __init__(self, sequences: Iterable[Packed]) -> None:
        rows = [(s.tokens, s.targets, s.positions) for s in sequences]
        tokens, targets, positions = (np.concatenate(column) for column in zip(*rows, strict=True))
        self.tokens = tokens
        self.places = np.flatnonzero((targets != NO_TARGET) & (targets != Bytes.DOCUMENT))
        self.nexts = targets[self.places]
        self.reach = positions[self.places] + 1

    def of(self, order: int) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """Selects the examples that have `order` symbols before them, bool [examples]; for those, the contexts and the
        bytes."""
        has_context = self.reach >= order
        places = self.places[has_context]
        contexts = np.zeros(len(places), dtype=np.int64)
        for back in reversed(range(order)):
            contexts = contexts * BASE + self.tokens[places - back]
        return has_context, contexts, self.nexts[has_context]


def _interpolate(
    counted_contexts: NDArray[np.int64],
    counted_nexts: NDArray[np.int64],
    contexts: NDArray[np.int64],
    nexts: NDArray[np.int64],
    shorter: NDArray[np.float64],
) -> NDArray[np.float64]:
    """p(next | context) for the scored pairs, float64 [scored], given p(next | shorter context)."""
    pairs, pair_counts = np.unique(counted_contexts * BASE + counted_nexts, return_counts=True)
    heads, begins, kinds = np.unique(pairs // BASE, return_index=True, return_counts=True)
    head_counts = np.add.reduceat(pair_counts, begins)
    c_hw = _look_up(pairs, pair_counts, contexts * BASE + nexts)
    c_h, t_h = _look_up(heads, head_counts, contexts), _look_up(heads, kinds, contexts)
    return np.where(c_h > 0, (c_hw + t_h * shorter) / np.maximum(c_h + t_h, 1), shorter)


def _look_up(keys: NDArray[np.int64], values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """values[i] where keys[i] (sorted) is wanted, 0 where none is."""
    places = np.searchsorted(keys, wanted)
    present = np.append(keys, -1)[places] == wanted
    return np.where(present, np.append(values, 0)[places], 0)
