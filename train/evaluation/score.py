"""The scores of sequences, whoever holds them: each is spread over the ranks, and every rank has all that came out.

What is measured is then plain arithmetic on arrays, the same on every rank and at any number of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.pack import Packed
from parallel.schedule.static import Static
from train.execute import Executor

TOGETHER = 16_384  # tokens of short sequences that a group of ranks takes at once

OnProgress = Callable[[int, int], None]  # how many tokens are done, and of how many


class Score(NamedTuple):
    """The scores of a sequence's tokens [L]: the nats of its target, float64, and whether that is the likeliest
    token."""

    nats: NDArray[np.float64]
    right: NDArray[np.bool_]


class Scorer:
    """`data` groups of `sequence` ranks, each of which holds a part of every sequence of its group. Collective."""

    def __init__(self, executor: Executor, data: int, sequence: int):
        self.executor, self.data, self.sequence = executor, data, sequence
        self.scheduler = Static(layout="contiguous")

    def __call__(self, sequences: Sequence[Packed], tell: OnProgress = lambda done, of: None) -> list[Score]:
        """Scores sequences, in their order."""
        scores: list[Score] = []
        done, total = 0, sum(len(s.tokens) for s in sequences)
        for batch in self._batches(sequences):
            lengths = [len(s.tokens) for s in batch]
            plan = self.scheduler.plan(0, lengths, data=self.data, sequence=self.sequence)
            nats, right = (x.cpu().numpy() for x in self.executor.score(plan, batch))
            cuts = np.cumsum(lengths)[:-1]
            scores += [Score(*parts) for parts in zip(np.split(nats, cuts), np.split(right, cuts), strict=True)]
            done += sum(lengths)
            tell(done, total)
        return scores

    def _batches(self, sequences: Sequence[Packed]) -> Iterator[list[Packed]]:
        """Neighbours, as many as fit; one that is longer has a batch to itself, or as many as there are groups."""
        batch: list[Packed] = []
        for sequence in sequences:
            longest = max(len(s.tokens) for s in (*batch, sequence))
            if batch and sum(len(s.tokens) for s in batch) + len(sequence.tokens) > self.data * max(longest, TOGETHER):
                yield batch
                batch = []
            batch.append(sequence)
        if batch:
            yield batch
