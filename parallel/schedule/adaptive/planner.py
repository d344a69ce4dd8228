"""The fast planner: which sequences share a micro-step and a group, so that the step takes least time.

A step is its micro-steps one after another, each as long as its slowest group. Lengths, rounded up to `quantum`, take
few values, so (length, count) pairs are packed into classes of identical groups:

1. `_Search.pack`: within T seconds, longest first, into the tightest open group that has time and room left, or into a
   new group of the fewest ranks that keep to T; sequences that find no place are left for the next micro-step.
2. The number of micro-steps (the fewest that memory allows, and two more) and the time of the first, which holds the
   longest sequences, are searched on a grid that is refined once; the last one's time is found by bisection.
3. A fixed number of improvement rounds takes the slowest group of a micro-step and moves, or swaps, one sequence.
   Ranks that differ in speed matter here: the search plans for alike ranks.

Deterministic: no clock, no random choice. `bound` is below every plan's time.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel.schedule.adaptive.bound import lower_bound
from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.improve import improve
from parallel.schedule.adaptive.packing import Packing, Share, place
from parallel.schedule.adaptive.simulate import seconds

_GRID = 10
_HALVINGS = 7
_CLOSE = 1e-3  # of a micro-step's time: a finer bisection is lost in the packing


class TooLongError(ValueError):
    """A sequence fits no group. `length` and `limit`, in tokens."""

    def __init__(self, length: int, limit: int, costs: Costs):
        self.length, self.limit = length, limit
        spare = "" if len(costs.names) > 1 else ", recomputation"
        super().__init__(
            f"a sequence of {length:,} tokens fits no group: the largest that fits {max(costs.sizes)} ranks is "
            f"{limit:,}; more ranks, more memory{spare} or a window (data.max_length) would change that"
        )


class _Class:
    """`many` identical groups: seconds used by recompute choice, tokens, and (item, count) pairs."""

    __slots__ = ("size", "many", "used", "tokens", "items")

    def __init__(self, size: int, many: int, used: list[float], tokens: float, items: list[tuple[int, int]]):
        self.size, self.many, self.used, self.tokens, self.items = size, many, used, tokens, items


@dataclass
class _Packed:
    seconds: float  # of the slowest group, without the launch
    classes: list[_Class]
    left: list[int]  # counts of items that found no place
    work: float  # rank-seconds at least, of those


class _Search:
    """Packing of one batch's distinct lengths, descending, of `counts` sequences each."""

    def __init__(self, costs: Costs, lengths: list[int], counts: list[int]):
        self.ranks = costs.cluster.ranks
        self.lengths, self.counts, self.sizes = lengths, counts, costs.sizes
        self.choices = range(len(costs.names))
        speed = float(len(costs.speeds) / (1 / costs.speeds).sum())
        tokens = np.array(lengths, dtype=np.float64)
        computing = [costs.computing(tokens, choice).sum(0) / speed for choice in self.choices]
        # [size][item][choice], without what a group costs whatever it holds: that is [size]
        self.seconds = [
            np.stack([c / size + costs.sending(size).sum() * tokens for c in computing], axis=1).tolist()
            for size in self.sizes
        ]
        self.fixed = [float(costs.fixed(size).sum()) for size in self.sizes]
        room = costs.rank_tokens.min(axis=1)
        self.room = [[float(room[choice]) * size for choice in self.choices] for size in self.sizes]
        self.most = [max(rooms) for rooms in self.room]
        # an item alone on each size, at its cheapest choice; infinite where it does not fit
        alone = np.full((len(self.sizes), len(lengths)), np.inf)
        for g, size in enumerate(self.sizes):
            for choice in self.choices:
                fits = tokens <= room[choice] * size
                own = np.array(self.seconds[g])[:, choice] + self.fixed[g]
                alone[g] = np.where(fits, np.minimum(alone[g], own), alone[g])
        if len(lengths) and not np.isfinite(alone[:, 0].min()):
            raise TooLongError(lengths[0], int(max(self.most)), costs)
        self.alone = alone.tolist()
        self.fastest = alone.min(0).tolist()
        work = np.stack([np.array(self.seconds[g]).min(1) * size for g, size in enumerate(self.sizes)])
        self.work = np.where(np.isfinite(alone), work, np.inf).min(0).tolist()
        self.total_tokens = float(max(room) * self.ranks)

    def needed(self, counts: list[int]) -> int:
        """Micro-steps at least, by tokens."""
        return max(1, math.ceil(sum(n * s for n, s in zip(counts, self.lengths, strict=True)) / self.total_tokens))

    def pack(self, limit: float, counts: list[int], *, all_or_none: bool) -> _Packed | None:
        """As many as fit one micro-step within `limit` seconds; None where some do not and all must."""
        slack = limit * (1 + 1e-12)
        free, left, work = self.ranks, [0] * len(counts), 0.0
        several, classes = len(self.choices) > 1, []
        shortest = max((k for k, n in enumerate(counts) if n), default=0)
        open_: list[list[_Class]] = [[] for _ in self.sizes]  # by the time that is left, the tightest first
        times: list[list[float]] = [[] for _ in self.sizes]  # that is left, of those
        for k, n in enumerate(counts):
            tokens = self.lengths[k]
            while n:
                found, tightest = None, math.inf
                for g, own in enumerate(times):
                    first = self.seconds[g][k][0]
                    if not own or own[-1] < first:
                        continue
                    room = self.room[g][0] - tokens
                    for i in range(bisect_left(own, first), len(own)):
                        if own[i] >= tightest:
                            break
                        if open_[g][i].tokens <= room or (several and self._fits(slack, open_[g][i], k)):
                            found, tightest = (g, i), own[i]
                            break
                if found is None:
                    g = next((g for g, alone in enumerate(self.alone) if alone[k] <= slack), -1)
                    many = free // self.sizes[g] if g >= 0 else 0
                    if not many:
                        if all_or_none:
                            return None
                        left[k], work = n, work + n * self.work[k]
                        break
                    c = _Class(g, many, [self.fixed[g]] * len(self.choices), 0.0, [])
                else:
                    g, i = found
                    c = open_[g].pop(i)
                    times[g].pop(i)
                each = min(self._fits(slack, c, k), n)
                full = min(c.many, n // each)
                if found is None:
                    free -= full * self.sizes[g]
                elif full < c.many:
                    rest = _Class(g, c.many - full, c.used, c.tokens, c.items)
                    at = bisect_left(times[g], slack - c.used[0])
                    times[g].insert(at, slack - c.used[0])
                    open_[g].insert(at, rest)
                used = [u + each * s for u, s in zip(c.used, self.seconds[g][k], strict=True)]
                changed = _Class(g, full, used, c.tokens + each * tokens, [*c.items, (k, each)])
                if self._fits(slack, changed, shortest):
                    at = bisect_left(times[g], slack - used[0])
                    times[g].insert(at, slack - used[0])
                    open_[g].insert(at, changed)
                else:
                    classes.append(changed)
                n -= full * each
        classes += [c for own in open_ for c in own]
        return _Packed(max((self._time(c) for c in classes), default=0.0), classes, left, work)

    def _fits(self, slack: float, c: _Class, k: int) -> int:
        """How many of item k fit a group of this class."""
        fits = 0
        for used, own, room in zip(c.used, self.seconds[c.size][k], self.room[c.size], strict=True):
            by_time, by_room = (slack - used) / own, (room - c.tokens) / self.lengths[k]
            fits = max(fits, int(by_time if by_time < by_room else by_room))
        return fits

    def _time(self, c: _Class) -> float:
        return min(c.used[choice] for choice in self.choices if c.tokens <= self.room[c.size][choice])

    def choice(self, c: _Class) -> int:
        return min((c.used[i], i) for i in self.choices if c.tokens <= self.room[c.size][i])[1]

    def last(self, counts: list[int], limit: float) -> _Packed | None:
        """All of `counts` in one micro-step as short as bisection makes it, below `limit`."""
        best = self.pack(limit, counts, all_or_none=True)
        if best is None:
            return None
        low = max(
            max(f for f, n in zip(self.fastest, counts, strict=True) if n),
            sum(n * w for n, w in zip(counts, self.work, strict=True)) / self.ranks,
        )
        for _ in range(_HALVINGS):
            if best.seconds - low <= _CLOSE * best.seconds:
                break
            middle = (low + best.seconds) / 2
            found = self.pack(middle, counts, all_or_none=True)
            if found is None:
                low = middle
            else:
                best = found
        return best


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
        padded = -(-np.asarray(lengths, dtype=np.int64) // self.quantum) * self.quantum
        values, counts = np.unique(padded, return_counts=True)
        search = _Search(self.costs, values[::-1].tolist(), counts[::-1].tolist())
        bound = lower_bound(self.costs, search.lengths, search.counts)
        packing = self._ranks(search, self._search(search), padded)
        held: list[int] = padded.tolist()
        packing = improve(self.costs, packing, held, self.rounds if self.costs.alike else self.rounds * 16)
        return Planned(packing, seconds(self.costs, packing, held), bound)

    def _search(self, search: _Search) -> list[_Packed]:
        launch, counts = self.costs.model.launch, search.counts
        best, best_seconds = None, math.inf
        fewest = search.needed(counts)
        m = fewest
        while m <= fewest + self.more or best is None:
            found = self._micro_steps(search, counts, m, best_seconds, _GRID)
            if found is not None:
                best, best_seconds = found, sum(p.seconds + launch for p in found)
            m += 1
        assert best is not None
        return best

    def _micro_steps(self, search: _Search, counts: list[int], m: int, below: float, grid: int) -> list[_Packed] | None:
        """`counts` in m micro-steps that take less than `below` seconds; None where none are found."""
        launch, ranks = self.costs.model.launch, search.ranks
        work = sum(n * w for n, w in zip(counts, search.work, strict=True)) / ranks
        longest = max(f for f, n in zip(search.fastest, counts, strict=True) if n)
        if max(work, longest) + m * launch >= below:
            return None
        if m == 1:
            top = (
                below - launch
                if math.isfinite(below)
                else sum(n * f for n, f in zip(counts, search.fastest, strict=True))
            )
            packed = search.last(counts, top)
            return None if packed is None or packed.seconds + launch >= below else [packed]
        best: list[_Packed] | None = None
        low = max(longest, work / m)
        high = below - m * launch if math.isfinite(below) else max(2.5 * work, 1.5 * longest)
        high = min(high, max(1.6 * work, 1.2 * longest))
        points = [low + (high - low) * (i / (grid - 1)) ** 2 for i in range(grid)]
        seen: dict[float, float] = {}
        for stage in (0, 1):
            for point in points:
                first = search.pack(point, counts, all_or_none=False)
                assert first is not None
                if first.seconds + first.work / ranks + m * launch >= below:
                    continue
                if not any(first.left):
                    rest: list[_Packed] | None = []
                else:
                    rest = self._micro_steps(
                        search, first.left, m - 1, below - first.seconds - launch, max(2, grid // 3)
                    )
                if rest is not None:
                    best = [first, *rest]
                    below = sum(p.seconds + launch for p in best)
                    seen[point] = below
            if best is None or stage:
                break
            centre = min(seen, key=seen.__getitem__)
            i = points.index(centre)
            left, right = points[max(i - 1, 0)], points[min(i + 1, grid - 1)]
            points = [left + (right - left) * (j + 0.5) / 6 for j in range(6)]
        return best

    def _ranks(self, search: _Search, found: list[_Packed], padded: np.ndarray) -> Packing:
        """Sequences for items, and ranks for groups."""
        order = np.argsort(-padded, kind="stable").tolist()
        begins = np.concatenate([[0], np.cumsum(search.counts)]).tolist()
        nexts = begins[:-1]
        micro_steps = []
        for packed in found:
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
