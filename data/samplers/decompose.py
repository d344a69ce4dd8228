"""Dataset Decomposition (2405.13226): documents as sequences of power-of-two lengths, each out of one document.

A document of n tokens is split as n is written in binary, the longest piece first. What is below the shortest bucket is
left out. From a document that holds more than one of the longest bucket twice over, pieces are first taken of a random
bucket, each with a probability inverse to its length, so that every bucket gets the same of it; or the longest ones.

The published code makes pieces of 2^k + 1 tokens, the last of which is only ever a target. Here the next piece begins
with it, so that every token is read once and none is lost at a border.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data.samplers.index import Ints
from data.samplers.permute import digest

VERSION = 1
Overlong = Literal["random", "longest"]
OVERLONG = get_args(Overlong)


def split(begins: Ints, lengths: Ints, low: int, high: int, overlong: str = "random") -> Iterator[tuple[int, Ints]]:
    """(k, begins int64 [n] of pieces of 2^k tokens) of documents, each k from `high` down to `low` any number of times.

    begins names a document for the draws that cut an overlong one: the same document is cut alike every time.
    """
    begins, left = begins.copy(), lengths.copy()
    long = np.flatnonzero(left >= 2 << high)
    seeds = np.array([int.from_bytes(digest("overlong", int(b)), "little") for b in begins[long]], dtype=np.uint64)
    draw = 0
    while long.size:
        drawn = _draw(seeds, draw, low, high) if overlong == "random" else np.full(long.size, high)
        for each in np.unique(drawn).tolist():
            yield each, begins[long[drawn == each]]
        size = np.int64(1) << drawn
        begins[long] += size
        left[long] -= size
        still = left[long] >= 2 << high
        long, seeds, draw = long[still], seeds[still], draw + 1
    for k in range(high, low - 1, -1):
        has = np.flatnonzero((left >> k) & 1)
        if has.size:
            yield k, begins[has]
            begins[has] += 1 << k


def _draw(seeds: NDArray[np.uint64], draw: int, low: int, high: int) -> Ints:
    """low..high, each with a probability inverse to 2^k, int64 [n]."""
    x = seeds + np.uint64(0x9E3779B97F4A7C15) * np.array([draw + 1], dtype=np.uint64)  # SplitMix64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    u = (x ^ (x >> np.uint64(31))) % np.uint64((2 << (high - low)) - 1)
    return high - (np.frexp((u + np.uint64(1)).astype(np.float64))[1].astype(np.int64) - 1)


@dataclass(frozen=True)
class Table:
    """Counts of sequences by length, as a schedule sees a decomposed corpus, and its costs."""

    lengths: Sequence[int]
    sequences: Sequence[int]

    @property
    def tokens(self) -> int:
        return sum(n * length for n, length in zip(self.sequences, self.lengths, strict=True))

    @property
    def mean_length(self) -> float:
        """The mean length of the sequence that a token is in."""
        return sum(n * length * length for n, length in zip(self.sequences, self.lengths, strict=True)) / self.tokens

    def cycle(self, tokens: int, cycles: int, unit: int, odds: Sequence[int]) -> "Cycle":
        """Shares of each bucket in each of `cycles` cycles of a run of `tokens`, in whole units of `unit` tokens.

        By the authors' rule: a bucket's share is rounded to whole units, and the longest bucket takes what is missing
        to a whole number of them. odds: by bucket, of a curriculum.
        """
        wanted = -(-tokens // (cycles * unit))
        units = [(2 * n * length * tokens + self.tokens * cycles * unit) // (2 * self.tokens * cycles * unit)
                 for n, length in zip(self.sequences, self.lengths, strict=True)]  # fmt: skip
        units[-1] += max(wanted - sum(units), 0)
        sequences = [n * unit // length for n, length in zip(units, self.lengths, strict=True)]
        return Cycle(sequences, [n * o for n, o in zip(units, odds, strict=True)], sum(units) * unit)


@dataclass(frozen=True)
class Cycle:
    """One cycle: sequences by bucket, the weights that buckets are drawn by, tokens."""

    sequences: list[int]
    weights: list[int]
    tokens: int
