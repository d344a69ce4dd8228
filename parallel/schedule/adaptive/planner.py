"""The fast planner: which sequences share a micro-step and a group, so that the step takes least time.

A step is its micro-steps one after another, each as long as its slowest group. Lengths, rounded up to `quantum`, take
few values, so (length, count) pairs are packed into classes of identical groups:

1. `Search.pack`: within T seconds, longest first, into the tightest open group that has time and room left, or into a
   new group of the fewest ranks that keep to T; sequences that find no place are left for the next micro-step.
2. The number of micro-steps (the fewest that memory allows, and two more) and the time of the first, which holds the
   longest sequences, are searched on a grid that is refined once; the last one's time is found by bisection.
3. A fixed number of improvement rounds takes the slowest group of a micro-step and moves, or swaps, one sequence.
   Ranks that differ in speed matter here: the search plans for alike ranks.

Deterministic: no clock, no random choice. `bound` is below every plan's time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from parallel.schedule.adaptive.bound import lower_bound
from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.improve import improve
from parallel.schedule.adaptive.packing import Packing, Share, place
from parallel.schedule.adaptive.search import CLOSE, HALVINGS, PackedStep, Search, TooLongError
from parallel.schedule.adaptive.simulate import seconds

_GRID = (10, 3, 2)  # times that are tried for the first, second, third micro-step, and again between the best
_DEEP = (12, 4, 3, 1)  # with more micro-steps than this, the first, second, third and all that follow are alike
_FEW = 128  # sequences, up to which a wider search costs little

_Steps = list[PackedStep] | None


def rounded(costs: Costs, lengths: Sequence[int], quantum: int) -> np.ndarray:
    """Lengths as multiples of `quantum`, int64 [n]; one that would fit no group for that stays as it is."""
    exact = np.asarray(lengths, dtype=np.int64)
    padded = -(-exact // quantum) * quantum
    return np.where(padded > max(costs.sizes) * costs.rank_tokens.min(axis=1).max(), exact, padded)


@dataclass(frozen=True)
class Planned:
    """A plan, its seconds, and a bound below which no plan's can be."""

    packing: Packing
    seconds: float
    bound: float


class Planner:
    """Adaptive groups. quantum: lengths are planned as multiples of it. rounds: of improvement, each micro-step.
    more: micro-steps that are tried beyond the fewest."""

    def __init__(self, costs: Costs, *, quantum: int = 128, rounds: int = 8, more: int = 2):
        self.costs, self.quantum, self.rounds, self.more = costs, quantum, rounds, more

    def plan(self, lengths: Sequence[int]) -> Planned:
        """Raises TooLongError for a sequence that fits no group, ValueError for no sequence or an empty one."""
        if not len(lengths) or min(lengths) < 1:
            raise ValueError("a step needs a sequence, and every sequence a token")
        padded = rounded(self.costs, lengths, self.quantum)
        values, counts = np.unique(padded, return_counts=True)
        search = Search(self.costs, values[::-1].tolist(), counts[::-1].tolist())
        bound = lower_bound(self.costs, search.lengths, search.counts)
        best = self._search(search, math.inf)
        assert best is not None  # every sequence fits a group, so each in a micro-step of its own does
        if len(self.costs.names) > 1 and (plain := self._plain(search)) is not None:
            better = self._search(plain, self._seconds(best))
            search, best = (search, best) if better is None else (plain, better)
        packing = self._ranks(search, best, padded)
        held: list[int] = padded.tolist()
        packing = improve(self.costs, packing, held, self.rounds if self.costs.alike else self.rounds * 16)
        return Planned(packing, seconds(self.costs, packing, held), bound + self.costs.model.once)

    def _plain(self, search: Search) -> Search | None:
        """The same with nothing computed again, where that may be better: where it takes as many micro-steps."""
        model = replace(self.costs.model, recompute=self.costs.model.recompute[:1])
        only = Costs(model, self.costs.cluster, self.costs.sizes)
        try:
            plain = Search(only, search.lengths, search.counts)
        except TooLongError:
            return None
        return plain if plain.needed(plain.counts) == search.needed(search.counts) else None

    def _search(self, search: Search, below: float) -> _Steps:
        """The best of some numbers of micro-steps; where sequences are few, of smallest groups allowed as well."""
        packing = self._counts(search, below)
        if sum(search.counts) <= _FEW:
            for floor in range(1, len(search.sizes)):
                limit = below if packing is None else self._seconds(packing)
                packing = self._counts(search.without(floor), limit) or packing
        return packing

    def _seconds(self, packing: list[PackedStep]) -> float:
        return sum(packed.seconds + self.costs.model.launch for packed in packing)

    def _counts(self, search: Search, below: float) -> _Steps:
        best: _Steps = None
        fewest = search.needed(search.counts)
        m = fewest
        while m <= fewest + self.more or (best is None and math.isinf(below)):
            packing = self._micro_steps(search, search.counts, m, below)
            if packing is not None:
                best, below = packing, self._seconds(packing)
            m += 1
        return best

    def _micro_steps(self, search: Search, counts: list[int], m: int, below: float, depth: int = 0) -> _Steps:
        """`counts` in m micro-steps that take less than `below` seconds; None where none are found."""
        launch, ranks = self.costs.model.launch, search.ranks
        work, longest = search.least_work(counts) / ranks, search.longest(counts)
        if max(work, longest) + m * launch >= below:
            return None
        if m == 1:
            every = 2 * sum(n * f for n, f in zip(counts, search.fastest, strict=True))  # one group of all ranks
            packed = search.last(counts, min(below - launch, every))
            return None if packed is None or packed.seconds + launch >= below else [packed]
        if m > _DEEP[depth]:
            return self._alike(search, counts, m, below)
        low = max(longest, work / m)
        high = max(1.6 * work, 1.2 * longest)
        high = min(high, below - m * launch) if math.isfinite(below) else high
        grid = _GRID[depth] if m < 6 else _GRID[depth] // 2
        points = [low + (high - low) * (i / (grid - 1)) ** 2 for i in range(grid)]  # closer where steps are alike
        best: _Steps = None
        for refined in (False, True):
            nearest = 0
            for i, point in enumerate(points):
                first = search.pack(point, counts, all_or_none=False)
                assert first is not None
                left = below - first.seconds - launch
                if first.work / ranks + (m - 1) * launch >= left:
                    continue
                rest = self._micro_steps(search, first.left, m - 1, left, depth + 1) if any(first.left) else []
                if rest is not None:
                    best, nearest = [first, *rest], i
                    below = self._seconds(best)
            if best is None or refined:
                break
            begin, end = points[max(nearest - 1, 0)], points[min(nearest + 1, grid - 1)]
            points = [begin + (end - begin) * (j + 0.5) / 6 for j in range(6)]
        return best

    def _alike(self, search: Search, counts: list[int], m: int, below: float) -> _Steps:
        """m micro-steps within the same time, by bisection of that."""
        work, longest = search.least_work(counts) / search.ranks, search.longest(counts)
        best: _Steps = None
        low = max(longest, work / m)
        high = max(2 * low, work)
        if math.isfinite(below):
            high = min(high, below - m * self.costs.model.launch)
        limit = high
        for _ in range(HALVINGS):
            alike: list[PackedStep] = []
            left = counts
            while any(left) and len(alike) < m:
                packed = search.pack(limit, left, all_or_none=False)
                assert packed is not None
                alike.append(packed)
                left = packed.left
            if any(left):
                if limit == high:
                    return None
                low = limit
            else:
                high = max(packed.seconds for packed in alike)
                if self._seconds(alike) < below:
                    best, below = alike, self._seconds(alike)
            limit = (low + high) / 2
            if high - low <= CLOSE * high:
                break
        return best

    def _ranks(self, search: Search, packing: list[PackedStep], padded: np.ndarray) -> Packing:
        """Sequences for items, and ranks for groups."""
        order = np.argsort(-padded, kind="stable").tolist()
        begins = np.concatenate([[0], np.cumsum(search.counts)]).tolist()
        nexts = begins[:-1]
        micro_steps = []
        for packed in packing:
            groups = []
            for c in packed.classes:
                name = self.costs.names[search.choice(c)]
                for _ in range(c.many):
                    held: list[int] = []
                    for k, n in c.items:
                        held += order[nexts[k] : nexts[k] + n]
                        nexts[k] += n
                    groups.append((search.sizes[c.size], tuple(sorted(held)), name))
            groups.sort(key=lambda group: -group[0])
            firsts = place([size for size, _, _ in groups], self.costs.speeds.tolist())
            micro_steps.append(tuple(Share(first, *group) for first, group in zip(firsts, groups, strict=True)))
        return Packing(tuple(micro_steps))
