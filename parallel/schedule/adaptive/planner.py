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
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from parallel.schedule.adaptive.bound import lower_bound
from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.improve import improve
from parallel.schedule.adaptive.packing import Packing, Share, place
from parallel.schedule.adaptive.simulate import seconds

_GRID = (10, 3, 2)  # times that are tried for the first, second, third micro-step, and again between the best
_DEEP = (12, 4, 3, 1)  # with more micro-steps than this, the first, second, third and all that follow are alike
_HALVINGS = 7
_FEW = 128  # sequences, up to which a wider search costs little
_CLOSE = 1e-3  # of a micro-step's time: a finer bisection is lost in the packing


class TooLongError(ValueError):
    """A sequence fits no group. `length` and `limit`, in tokens."""

    def __init__(self, length: int, limit: int, costs: Costs):
        self.length, self.limit = length, limit
        spare = "" if len(costs.names) > 1 else ", recomputation"
        super().__init__(
            f"a sequence of {length:,} tokens fits no group: the largest that fits {max(costs.sizes)} ranks is "
            f"{limit:,}; more ranks, more memory{spare} or windows of it (data.max_length) would change that"
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


_Steps = list[_Packed] | None


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
        self.firsts = [[rows[k][0] for rows in self.seconds] for k in range(len(lengths))]
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

    def without(self, smallest: int) -> _Search:
        """The same where no group is smaller than sizes[smallest]."""
        other = copy(self)
        other.alone = [[math.inf] * len(row) if g < smallest else row for g, row in enumerate(self.alone)]
        other.fastest = np.min(other.alone, axis=0).tolist()
        return other

    def least_work(self, counts: list[int]) -> float:
        """Rank-seconds."""
        return sum(n * w for n, w in zip(counts, self.work, strict=True))

    def longest(self, counts: list[int]) -> float:
        """Seconds that the sequence which takes longest needs alone."""
        return max(f for f, n in zip(self.fastest, counts, strict=True) if n)

    def needed(self, counts: list[int]) -> int:
        """Micro-steps at least, by tokens."""
        return max(1, math.ceil(sum(n * s for n, s in zip(counts, self.lengths, strict=True)) / self.total_tokens))

    def pack(self, limit: float, counts: list[int], *, all_or_none: bool) -> _Packed | None:
        """Packs as many as fit one micro-step within `limit` seconds; None where some do not and all must."""
        slack = limit * (1 + 1e-12)
        free, left, work = self.ranks, [0] * len(counts), 0.0
        several, classes = len(self.choices) > 1, []
        shortest = max((k for k, n in enumerate(counts) if n), default=0)
        open_: list[list[_Class]] = [[] for _ in self.sizes]  # by the time that is left, the tightest first
        times: list[list[float]] = [[] for _ in self.sizes]  # that is left, of those
        for k, n in enumerate(counts):
            tokens, firsts = self.lengths[k], self.firsts[k]
            while n:
                best, tightest = None, math.inf
                for g, own in enumerate(times):
                    if not own or own[-1] < firsts[g]:
                        continue
                    room = self.room[g][0] - tokens
                    for i in range(bisect_left(own, firsts[g]), len(own)):
                        if own[i] >= tightest:
                            break
                        if open_[g][i].tokens <= room or (several and self._fits(slack, open_[g][i], k)):
                            best, tightest = (g, i), own[i]
                            break
                if best is None:
                    many = 0
                    for g, alone in enumerate(self.alone):
                        if alone[k] <= slack:
                            many = free // self.sizes[g]
                            break
                    if not many:
                        if all_or_none:
                            return None
                        left[k], work = n, work + n * self.work[k]
                        break
                    c = _Class(g, many, [self.fixed[g]] * len(self.choices), 0.0, [])
                else:
                    g, i = best
                    c = open_[g].pop(i)
                    times[g].pop(i)
                each = max(1, min(self._fits(slack, c, k), n))  # 1: found to fit, before rounding
                full = min(c.many, n // each)
                if best is None:
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
        """Counts the items k that fit a group of this class."""
        if len(c.used) == 1:
            by_time = (slack - c.used[0]) / self.seconds[c.size][k][0]
            by_room = (self.room[c.size][0] - c.tokens) / self.lengths[k]
            return int(by_time if by_time < by_room else by_room)
        fits = 0
        for used, own, room in zip(c.used, self.seconds[c.size][k], self.room[c.size], strict=True):
            by_time, by_room = (slack - used) / own, (room - c.tokens) / self.lengths[k]
            fits = max(fits, int(by_time if by_time < by_room else by_room))
        return fits

    def _time(self, c: _Class) -> float:
        if len(c.used) == 1:
            return c.used[0]
        return min(c.used[choice] for choice in self.choices if c.tokens <= self.room[c.size][choice])

    def choice(self, c: _Class) -> int:
        return min((c.used[i], i) for i in self.choices if c.tokens <= self.room[c.size][i])[1]

    def last(self, counts: list[int], limit: float) -> _Packed | None:
        """All of `counts` in one micro-step as short as bisection makes it, below `limit`."""
        best = self.pack(limit, counts, all_or_none=True)
        if best is None:
            return None
        low = max(
            self.longest(counts),
            self.least_work(counts) / self.ranks,
        )
        for _ in range(_HALVINGS):
            if best.seconds - low <= _CLOSE * best.seconds:
                break
            middle = (low + best.seconds) / 2
            packing = self.pack(middle, counts, all_or_none=True)
            if packing is None:
                low = middle
            else:
                best = packing
        return best


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
        search = _Search(self.costs, values[::-1].tolist(), counts[::-1].tolist())
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

    def _plain(self, search: _Search) -> _Search | None:
        """The same with nothing computed again, where that may be better: where it takes as many micro-steps."""
        model = replace(self.costs.model, recompute=self.costs.model.recompute[:1])
        only = Costs(model, self.costs.cluster, self.costs.sizes)
        try:
            plain = _Search(only, search.lengths, search.counts)
        except TooLongError:
            return None
        return plain if plain.needed(plain.counts) == search.needed(search.counts) else None

    def _search(self, search: _Search, below: float) -> _Steps:
        """The best of some numbers of micro-steps; where sequences are few, of smallest groups allowed as well."""
        packing = self._counts(search, below)
        if sum(search.counts) <= _FEW:
            for floor in range(1, len(search.sizes)):
                limit = below if packing is None else self._seconds(packing)
                packing = self._counts(search.without(floor), limit) or packing
        return packing

    def _seconds(self, packing: list[_Packed]) -> float:
        return sum(packed.seconds + self.costs.model.launch for packed in packing)

    def _counts(self, search: _Search, below: float) -> _Steps:
        best: _Steps = None
        fewest = search.needed(search.counts)
        m = fewest
        while m <= fewest + self.more or (best is None and math.isinf(below)):
            packing = self._micro_steps(search, search.counts, m, below)
            if packing is not None:
                best, below = packing, self._seconds(packing)
            m += 1
        return best

    def _micro_steps(self, search: _Search, counts: list[int], m: int, below: float, depth: int = 0) -> _Steps:
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

    def _alike(self, search: _Search, counts: list[int], m: int, below: float) -> _Steps:
        """m micro-steps within the same time, by bisection of that."""
        work, longest = search.least_work(counts) / search.ranks, search.longest(counts)
        best: _Steps = None
        low = max(longest, work / m)
        high = max(2 * low, work)
        if math.isfinite(below):
            high = min(high, below - m * self.costs.model.launch)
        limit = high
        for _ in range(_HALVINGS):
            alike: list[_Packed] = []
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
            if high - low <= _CLOSE * high:
                break
        return best

    def _ranks(self, search: _Search, packing: list[_Packed], padded: np.ndarray) -> Packing:
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
