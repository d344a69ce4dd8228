"""Sequences into groups of one micro-step, within a time: what the fast planner's search tries again and again.

Lengths, rounded, take few values, so pairs (length, count) are packed into classes of identical groups. An item is a
distinct length, by its place from the longest. A group's seconds and tokens are those of its slowest rank, of alike
ranks; where groups may compute again, a group has seconds for each choice, and its choice is made when it is full.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from copy import copy
from dataclasses import dataclass

import numpy as np

from parallel.schedule.adaptive.cost import Costs

HALVINGS = 7  # of a bisection at most
CLOSE = 1e-3  # of a micro-step's time: a finer bisection is lost in the packing


class TooLongError(ValueError):
    """A sequence fits no group. `length` and `limit`, in tokens."""

    def __init__(self, length: int, limit: int, costs: Costs):
        self.length, self.limit = length, limit
        spare = "" if len(costs.names) > 1 else ", recomputation"
        super().__init__(
            f"a sequence of {length:,} tokens fits no group: the largest that fits {max(costs.sizes)} ranks is "
            f"{limit:,}; more ranks, more memory{spare} or windows of it (data.max_length) would change that"
        )


class AlikeGroups:
    """`many` identical groups: seconds used by recompute choice, tokens, and (item, count) pairs."""

    __slots__ = ("size", "many", "used", "tokens", "items")

    def __init__(self, size: int, many: int, used: list[float], tokens: float, items: list[tuple[int, int]]):
        self.size, self.many, self.used, self.tokens, self.items = size, many, used, tokens, items


@dataclass
class PackedStep:
    seconds: float  # of the slowest group, without the launch
    classes: list[AlikeGroups]
    left: list[int]  # counts of items that found no place
    work: float  # rank-seconds at least, of those


class Search:
    """Packing of one batch's distinct lengths, descending, of `counts` sequences each."""

    def __init__(self, costs: Costs, lengths: list[int], counts: list[int]):
        self.ranks = costs.cluster.ranks
        self.lengths, self.counts, self.sizes = lengths, counts, costs.sizes
        self.choices, self.others = range(len(costs.names)), range(1, len(costs.names))
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
        self.excess = np.maximum(work - np.array(self.work), 0).tolist()  # [size][item], over the least work
        self.total_tokens = float(max(room) * self.ranks)

    def without(self, smallest: int) -> Search:
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

    def pack(self, limit: float, counts: list[int], *, all_or_none: bool) -> PackedStep | None:
        """Packs as many as fit one micro-step within `limit` seconds; None where some do not and all must."""
        slack = limit * (1 + 1e-12)
        free, left, work = self.ranks, [0] * len(counts), 0.0
        several, classes = len(self.choices) > 1, []
        shortest = max((k for k, n in enumerate(counts) if n), default=0)
        # rank-seconds that may be lost where all must fit: to groups that take more work, or have no use for them
        spare = 1.000001 * slack * self.ranks - self.least_work(counts) if all_or_none else math.inf
        open_: list[list[AlikeGroups]] = [[] for _ in self.sizes]  # by the time that is left, the tightest first
        times: list[list[float]] = [[] for _ in self.sizes]  # that is left, of those
        for k, n in enumerate(counts):
            tokens, firsts = self.lengths[k], self.firsts[k]
            while n:
                at, tightest = None, math.inf
                for g, own in enumerate(times):
                    if not own or own[-1] < firsts[g]:
                        continue
                    room = self.room[g][0] - tokens
                    for i in range(bisect_left(own, firsts[g]), len(own)):
                        if own[i] >= tightest:
                            break
                        if open_[g][i].tokens <= room or (several and self._again(slack, open_[g][i], k)):
                            at, tightest = (g, i), own[i]
                            break
                if at is not None:
                    g, i = at
                    c = open_[g].pop(i)
                    del times[g][i]
                    each = min(self._fits(slack, c, k) or 1, n)  # 1: found to fit, before rounding
                    full = min(c.many, n // each)
                    if full < c.many:
                        i = bisect_left(times[g], tightest)
                        times[g].insert(i, tightest)
                        open_[g].insert(i, AlikeGroups(g, c.many - full, c.used, c.tokens, c.items.copy()))
                        c.many = full
                    spare -= full * each * self.excess[g][k]
                else:
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
                    c = AlikeGroups(g, many, [self.fixed[g]] * len(self.choices), 0.0, [])
                    each = min(self._fits(slack, c, k) or 1, n)
                    c.many = full = min(many, n // each)
                    free -= full * self.sizes[g]
                    spare -= full * (self.sizes[g] * self.fixed[g] + each * self.excess[g][k])
                n -= full * each
                c.used = [u + each * s for u, s in zip(c.used, self.seconds[g][k], strict=True)]
                c.tokens += each * tokens
                c.items.append((k, each))
                rest = slack - c.used[0]
                small = rest >= self.firsts[shortest][g] and c.tokens + self.lengths[shortest] <= self.room[g][0]
                if small or (several and self._again(slack, c, shortest)):
                    i = bisect_left(times[g], rest)
                    times[g].insert(i, rest)
                    open_[g].insert(i, c)
                else:
                    classes.append(c)
                    spare -= full * self.sizes[g] * max(0.0, slack - c.used[-1])
                if spare < 0:
                    return None
        classes += [c for own in open_ for c in own]
        return PackedStep(max((self._time(c) for c in classes), default=0.0), classes, left, work)

    def _fits(self, slack: float, c: AlikeGroups, k: int) -> int:
        """Counts the items k that fit a group of this class."""
        own, rooms, used = self.seconds[c.size][k], self.room[c.size], c.used
        by_time, by_room = (slack - used[0]) / own[0], (rooms[0] - c.tokens) / self.lengths[k]
        fits = by_time if by_time < by_room else by_room
        for choice in self.others:
            by_time, by_room = (slack - used[choice]) / own[choice], (rooms[choice] - c.tokens) / self.lengths[k]
            other = by_time if by_time < by_room else by_room
            fits = other if other > fits else fits
        return int(fits) if fits > 0 else 0

    def _again(self, slack: float, c: AlikeGroups, k: int) -> bool:
        """One item k fits a group of this class that computes again."""
        rooms, own, tokens = self.room[c.size], self.seconds[c.size][k], c.tokens + self.lengths[k]
        for choice in self.others:
            if tokens <= rooms[choice] and slack - c.used[choice] >= own[choice]:
                return True
        return False

    def _time(self, c: AlikeGroups) -> float:
        if len(c.used) == 1:
            return c.used[0]
        return min(c.used[choice] for choice in self.choices if c.tokens <= self.room[c.size][choice])

    def choice(self, c: AlikeGroups) -> int:
        return min((c.used[i], i) for i in self.choices if c.tokens <= self.room[c.size][i])[1]

    def last(self, counts: list[int], limit: float) -> PackedStep | None:
        """All of `counts` in one micro-step as short as bisection makes it, below `limit`."""
        best = self.pack(limit, counts, all_or_none=True)
        if best is None:
            return None
        low = max(self.longest(counts), self.least_work(counts) / self.ranks)
        for _ in range(HALVINGS):
            if best.seconds - low <= CLOSE * best.seconds:
                break
            middle = (low + best.seconds) / 2
            packing = self.pack(middle, counts, all_or_none=True)
            if packing is None:
                low = middle
            else:
                best = packing
        return best
