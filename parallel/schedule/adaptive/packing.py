"""A packing of one step's sequences into groups, before tokens are given to ranks: planners return it, simulators read
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parallel.schedule.plan import Group, MicroStep, Plan, Span
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

    @classmethod
    def of(cls, rows: Any) -> Packing:
        """Reads what `rows` gave, from JSON too. Raises ValueError for what it cannot have given."""
        try:
            return cls(
                tuple(
                    tuple(
                        Share(int(first), int(size), tuple(map(int, held)), str(how))
                        for first, size, held, how in micro
                    )
                    for micro in rows
                )
            )
        except TypeError as error:
            raise ValueError(f"a packing has rows of groups: {error}") from None

    def rows(self) -> list[Any]:
        """The micro-steps in JSON's types: for each group its first rank, its size, its sequences and recomputation."""
        return [
            [[share.first, share.size, list(share.sequences), share.recompute] for share in shares]
            for shares in self.micro_steps
        ]

    def check(self, ranks: int, sequences: int) -> None:
        """Raises ValueError unless every sequence runs once, and in each micro-step groups are aligned and apart."""
        for m, shares in enumerate(self.micro_steps):
            ranks_in_use = [rank for share in shares for rank in range(share.first, share.first + share.size)]
            if len(set(ranks_in_use)) != len(ranks_in_use) or not set(ranks_in_use) <= set(range(ranks)):
                raise ValueError(f"micro-step {m}: its groups overlap, or leave the {ranks} ranks")
            if wrong := [share for share in shares if share.first % share.size]:
                raise ValueError(f"micro-step {m}: {wrong[0].size} ranks from {wrong[0].first} on are not aligned")
        run = sorted(s for shares in self.micro_steps for share in shares for s in share.sequences)
        if run != list(range(sequences)):
            raise ValueError(f"the packing runs {len(run)} sequences of {sequences}, or some of them twice")

    def plan(self, step: int, lengths: Sequence[int], ranks: int, layout: str = "auto") -> Plan:
        """The work of each rank: spans by `balanced`, or one each (contiguous); ranks without a group are idle."""
        micro_steps = []
        for shares in self.micro_steps:
            groups = []
            for share in sorted(shares, key=lambda share: share.first):
                total = sum(lengths[s] for s in share.sequences)
                spans = balanced(total, share.size) if layout == "auto" else lay_out(total, share.size, layout)
                ranks_of = tuple(range(share.first, share.first + share.size))
                groups.append(Group(ranks_of, share.sequences, spans, share.recompute != "none"))
            busy = {rank for group in groups for rank in group.ranks}
            groups += [Group((rank,), (), ((),)) for rank in range(ranks) if rank not in busy]
            micro_steps.append(MicroStep(tuple(groups)))
        return Plan(step, tuple(lengths), tuple(micro_steps))


def balanced(total: int, size: int) -> tuple[tuple[Span, ...], ...]:
    """The spans of each rank, zigzag for any number of tokens: rank r has the r-th and the r-th from the end, of equal
    length, and the last rank, whose two meet, one span of whatever is left. Ranks differ by at most two tokens.

    Documents that share a group rarely have a number of tokens that `lay_out` could cut into equal spans, and one span
    a rank would give the last rank almost twice the mean of causal attention.
    """
    half, rest = divmod(total, 2 * size)
    if size == 1 or not half:
        return lay_out(total, size, "contiguous")
    held = [half + (r < rest // 2) for r in range(size - 1)]
    spans: list[tuple[Span, ...]] = []
    begin, end = 0, total
    for tokens in held:
        spans.append(((begin, begin + tokens), (end - tokens, end)))
        begin, end = begin + tokens, end - tokens
    return (*spans, ((begin, end),))


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
    occupied, firsts = [False] * ranks, []
    for size in sizes:
        free = [a for a in range(0, ranks - size + 1, size) if not any(occupied[a : a + size])]
        if not free:
            raise ValueError(f"no {size} aligned ranks are free of {ranks}")
        first = max(free, key=lambda a: (min(speeds[a : a + size]), -a))
        occupied[first : first + size] = [True] * size
        firsts.append(first)
    return firsts
