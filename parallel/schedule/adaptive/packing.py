"""A packing of one step's sequences into groups, before tokens are given to ranks: planners return it, simulators read
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.schedule.static import lay_out


@dataclass(frozen=True)
class Share:
    """`sequences` (indices into the batch) on ranks [first, first + size). recompute: the name of the choice."""

    first: int
    size: int
    sequences: tuple[int, ...]
    recompute: str = "none"


@dataclass(frozen=True)
class Packing:
    """The micro-steps of one step, each a tuple of groups on different ranks; a rank in none is idle."""

    micro_steps: tuple[tuple[Share, ...], ...]

    def check(self, ranks: int, sequences: int) -> None:
        """Raises ValueError unless every sequence runs once, and in each micro-step groups are aligned and apart."""
        for m, shares in enumerate(self.micro_steps):
            taken = [rank for share in shares for rank in range(share.first, share.first + share.size)]
            if len(set(taken)) != len(taken) or not set(taken) <= set(range(ranks)):
                raise ValueError(f"micro-step {m}: its groups overlap, or leave the {ranks} ranks")
            if wrong := [share for share in shares if share.first % share.size]:
                raise ValueError(f"micro-step {m}: {wrong[0].size} ranks from {wrong[0].first} on are not aligned")
        run = sorted(s for shares in self.micro_steps for share in shares for s in share.sequences)
        if run != list(range(sequences)):
            raise ValueError(f"the packing runs {len(run)} sequences of {sequences}, or some of them twice")

    def plan(self, step: int, lengths: Sequence[int], ranks: int, layout: str = "auto") -> Plan:
        """The work of each rank: spans as `Static` lays them out; ranks without a group are idle."""
        micro_steps = []
        for shares in self.micro_steps:
            groups = []
            for share in sorted(shares, key=lambda share: share.first):
                spans = lay_out(sum(lengths[s] for s in share.sequences), share.size, layout)
                groups.append(Group(tuple(range(share.first, share.first + share.size)), share.sequences, spans))
            busy = {rank for group in groups for rank in group.ranks}
            groups += [Group((rank,), (), ((),)) for rank in range(ranks) if rank not in busy]
            micro_steps.append(MicroStep(tuple(groups)))
        return Plan(step, tuple(lengths), tuple(micro_steps))


def place(sizes: Sequence[int], speeds: Sequence[float]) -> list[int]:
    """The first rank of each group of powers of two, `sizes` descending: the free aligned block whose slowest rank is
    the fastest, the leftmost of equals. Raises ValueError where they do not fit.

    What is placed is never smaller than what follows, so free ranks always form whole blocks.
    """
    ranks = len(speeds)
    if min(speeds) == max(speeds):  # leftmost is end to end
        firsts, at = [], 0
        for size in sizes:
            firsts.append(at)
            at += size
        if at > ranks:
            raise ValueError(f"groups of {at} ranks, there are {ranks}")
        return firsts
    taken, firsts = [False] * ranks, []
    for size in sizes:
        free = [a for a in range(0, ranks - size + 1, size) if not any(taken[a : a + size])]
        if not free:
            raise ValueError(f"no {size} aligned ranks are free of {ranks}")
        first = max(free, key=lambda a: (min(speeds[a : a + size]), -a))
        taken[first : first + size] = [True] * size
        firsts.append(first)
    return firsts
