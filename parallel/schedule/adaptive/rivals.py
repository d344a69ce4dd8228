"""Other schedulers behind the planner's interface, for comparison only. All are judged by `simulate.timing`.

BestFit        one size of group for a whole step: bins of 0.9 of a group's room, best-fit decreasing, sorted by
               time, as many at once as there are groups: what FlexSP (2412.01523) compares itself with
LongestFirst   one size for a whole step: the next longest sequence to the bin that is done first
OneSize        the planner of this package, held to one size of group in each step
WorkByPairs    Megatron's packing-aware rule, from its description: work is s²/group for every model
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.packing import Packing, Share
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.adaptive.search import TooLongError
from parallel.schedule.adaptive.simulate import seconds


class Scheduler(Protocol):
    """Lengths of a step's sequences in, a packing out. Raises TooLongError where one fits nowhere."""

    def pack(self, lengths: Sequence[int]) -> Packing: ...


class _OfSize(Scheduler):
    """A scheduler that has a way to pack groups of one size, and takes the best of all sizes, or `size`."""

    def __init__(self, costs: Costs, size: int | None = None):
        self.costs = costs
        self.sizes = costs.sizes if size is None else [size]

    def pack(self, lengths: Sequence[int]) -> Packing:
        largest = max(self.costs.room(0, 0, size) for size in self.sizes)
        packings = [packing for size in self.sizes for packing in self.packings(lengths, size)]
        if not packings:
            raise TooLongError(max(lengths), int(largest), self.costs)
        return min(packings, key=lambda packing: seconds(self.costs, packing, lengths))

    def packings(self, lengths: Sequence[int], size: int) -> list[Packing]:
        """None where a sequence does not fit this size."""
        raise NotImplementedError

    def _packing(self, bins: Sequence[Sequence[int]], size: int) -> Packing:
        groups = self.costs.cluster.ranks // size
        steps = [bins[i : i + groups] for i in range(0, len(bins), groups)]
        return Packing(
            tuple(tuple(Share(g * size, size, tuple(held)) for g, held in enumerate(step) if held) for step in steps)
        )


class BestFit(_OfSize):
    """fill: of a group's room that is used, except by a sequence that needs more."""

    def __init__(self, costs: Costs, size: int | None = None, fill: float = 0.9):
        super().__init__(costs, size)
        self.fill = fill

    def packings(self, lengths: Sequence[int], size: int) -> list[Packing]:
        room = self.costs.rank_tokens[0].min() * size
        if max(lengths) > room:
            return []
        usable = room * self.fill
        left: list[tuple[float, int]] = []  # room that is left, and which bin's
        bins: list[list[int]] = []
        for s in sorted(range(len(lengths)), key=lambda s: (-lengths[s], s)):
            i = next((i for i, (room_left, _) in enumerate(left) if room_left >= lengths[s]), None)
            if i is None:
                bins.append([s])
                insort(left, (max(usable - lengths[s], 0.0), len(bins) - 1))
            else:
                room_left, b = left.pop(i)
                bins[b].append(s)
                insort(left, (room_left - lengths[s], b))
        time = [self.costs.group([lengths[s] for s in held], 0, size).sum() for held in bins]
        return [self._packing([bins[b] for b in sorted(range(len(bins)), key=lambda b: (-time[b], b))], size)]


class LongestFirst(_OfSize):
    """With the fewest micro-steps that memory allows, or up to `more` beyond."""

    def __init__(self, costs: Costs, size: int | None = None, more: int = 2):
        super().__init__(costs, size)
        self.more = more

    def packings(self, lengths: Sequence[int], size: int) -> list[Packing]:
        room, groups = self.costs.rank_tokens[0].min() * size, self.costs.cluster.ranks // size
        if max(lengths) > room:
            return []
        fewest = max(1, math.ceil(sum(lengths) / (room * groups)))
        tokens = np.asarray(lengths, dtype=np.float64)
        own = self.costs.computing(tokens).sum(0) / size + self.costs.sending(size).sum() * tokens
        order = np.argsort(-own, kind="stable")
        packings: list[Packing] = []
        steps = fewest
        while steps <= fewest + self.more or not packings:
            time, held = np.zeros(groups * steps), np.zeros(groups * steps)
            bins: list[list[int]] = [[] for _ in time]
            for s in order.tolist():
                b = int(np.where(held + tokens[s] <= room, time, np.inf).argmin())
                if held[b] + tokens[s] > room:
                    break
                time[b] += own[s]
                held[b] += tokens[s]
                bins[b].append(s)
            else:
                ranked = sorted(range(len(bins)), key=lambda b: (-time[b], b))
                packings.append(self._packing([bins[b] for b in ranked], size))
            steps += 1
        return packings


class OneSize(_OfSize):
    """The best of the sizes, each planned as if there were no other."""

    def packings(self, lengths: Sequence[int], size: int) -> list[Packing]:
        only = Costs(self.costs.model, self.costs.cluster, [size])
        try:
            return [Planner(only, quantum=1).plan(lengths).packing]
        except TooLongError:
            return []


class WorkByPairs:
    """Micro-steps are formed one by one from what is left, longest first; ranks are filled in order.

    Work of a sequence is s²/group. It goes where the largest work of any rank stays least (into a group with room, or
    a new one; the smallest group of equals), at most the longest sequence's length times a rank's tokens and 5% more;
    what finds no place waits for the next micro-step. Then idle ranks are taken by doubling the smallest groups, the
    first of them first; where that fills not all, the micro-step is one group of all ranks.
    """

    SLACK = 0.05

    def __init__(self, costs: Costs, rank_tokens: int | None = None):
        self.costs = costs
        self.rank_tokens = int(costs.rank_tokens[0].min()) if rank_tokens is None else rank_tokens

    def pack(self, lengths: Sequence[int]) -> Packing:
        left = sorted(range(len(lengths)), key=lambda s: (-lengths[s], s))
        largest = max(self.costs.sizes)
        if lengths[left[0]] > self.rank_tokens * largest:
            raise TooLongError(lengths[left[0]], self.rank_tokens * largest, self.costs)
        micro_steps = []
        while left:
            groups, left = self._micro_step(lengths, left)
            firsts = np.concatenate([[0], np.cumsum([size for size, _ in groups])]).tolist()
            micro_steps.append(
                tuple(Share(first, size, tuple(held)) for first, (size, held) in zip(firsts, groups, strict=False))
            )
        return Packing(tuple(micro_steps))

    def _micro_step(self, lengths: Sequence[int], waiting: list[int]) -> tuple[list[tuple[int, list[int]]], list[int]]:
        ranks, most = self.costs.cluster.ranks, self.rank_tokens
        cap = lengths[waiting[0]] * most * (1 + self.SLACK)
        sizes: list[int] = []
        members: list[list[int]] = []
        work, held = np.zeros(0), np.zeros(0)
        left: list[int] = []
        free = ranks
        for s in waiting:
            length, best = lengths[s], (math.inf, 0, -1)
            top = work.max() if len(work) else 0.0
            size_G = np.array(sizes, dtype=np.int64)
            for size in (size for size in self.costs.sizes if size * most >= length):
                own = length * length / size
                fitting = np.flatnonzero((size_G == size) & (held + length / size <= most))
                if len(fitting):
                    after = np.maximum(top, work[fitting] + own)
                    at = int(after.argmin())
                    if after[at] <= cap and after[at] < best[0]:
                        best = (float(after[at]), size, int(fitting[at]))
                if free >= size and max(top, own) <= cap and max(top, own) < best[0]:
                    best = (max(top, own), size, -1)
                if not len(work):
                    break  # the longest takes the smallest group that holds it, whatever the cap
            _, size, at = best
            if not size and len(work):
                left.append(s)
                continue
            if not len(work):
                size = next(size for size in self.costs.sizes if size * most >= length)
                at = -1
            if at < 0:
                sizes.append(size)
                work, held, at = np.append(work, 0.0), np.append(held, 0.0), len(sizes) - 1
                members.append([])
                free -= size
            work[at] += length * length / size
            held[at] += length / size
            members[at].append(s)
        while free:
            smallest = min(sizes)
            at = next((g for g, size in enumerate(sizes) if size == smallest), -1)
            if smallest > free or 2 * smallest > max(self.costs.sizes):
                return self._all_ranks(lengths, waiting)
            sizes[at] *= 2
            free -= smallest
        return list(zip(sizes, members, strict=True)), left

    def _all_ranks(self, lengths: Sequence[int], waiting: list[int]) -> tuple[list[tuple[int, list[int]]], list[int]]:
        ranks, total = self.costs.cluster.ranks, 0
        occupied: list[int] = []
        left = []
        for s in waiting:
            if total + lengths[s] <= self.rank_tokens * ranks:
                total += lengths[s]
                occupied.append(s)
            else:
                left.append(s)
        return [(ranks, occupied)], left


class Balanced:
    """Megatron-core's `BalancedCPScheduler`, its own code, where megatron-core is installed; ImportError elsewhere.

    It runs a group's sequences one after another, each forward and backward, so that only the longest must fit a rank;
    here they share one launch, which flatters it, and the memory of all of them counts in `Timing.peak`, which does
    not.
    """

    def __init__(self, costs: Costs, rank_tokens: int | None = None):
        from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler

        self.costs = costs
        most = int(costs.rank_tokens[0].min()) if rank_tokens is None else rank_tokens
        self._megatron = BalancedCPScheduler(most, _Ranks(costs.cluster.ranks))

    def pack(self, lengths: Sequence[int]) -> Packing:
        _, micro_steps = self._megatron.get_groups_and_subsamples(list(enumerate(lengths)), None)
        packed = []
        for by_rank in micro_steps:
            shares: list[Share] = []
            for rank, held in enumerate(map(tuple, by_rank)):
                if held and shares and shares[-1].sequences == held:
                    shares[-1] = Share(shares[-1].first, shares[-1].size + 1, held)
                elif held:
                    shares.append(Share(rank, 1, held))
            packed.append(tuple(shares))
        return Packing(tuple(packed))


class _Ranks:
    """All that Megatron's scheduler asks of a process group."""

    def __init__(self, ranks: int):
        self._ranks = ranks

    def size(self) -> int:
        return self._ranks
