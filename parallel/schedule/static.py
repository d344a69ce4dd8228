"""The static scheduler: the same sequence-parallel groups in every micro-step of every step."""

from typing import Literal, get_args

from parallel.schedule.plan import Group, MicroStep, Plan, Span

LayoutName = Literal["auto", "contiguous", "zigzag"]
LAYOUTS = get_args(LayoutName)


class Static:
    """`parallel.data` groups of `parallel.sequence` neighbouring ranks.

    tokens_per_rank: the most tokens a rank may hold in one micro-step; null for no limit, which makes one micro-step.
    layout: layout of a sequence on its ranks. contiguous gives each one span, lengths differing by at most one token;
    the last rank then has the most causal attention to do. zigzag cuts twice as many equal spans as ranks and gives
    rank r the r-th and the r-th from the end, which balances it. auto is zigzag where the lengths divide, contiguous
    elsewhere. The loss is the same in all. simulate: steps over which `farspan plan` compares all schedulers on the
    cluster of `simulation`; null for the run's plan; no run reads it.
    """

    def __init__(self, *, tokens_per_rank: int | None = None, layout: LayoutName = "auto", simulate: int | None = None):
        self.simulate = checked_simulate(simulate)
        if layout not in LAYOUTS:
            raise ValueError(f"scheduler.layout={layout}: must be one of {', '.join(LAYOUTS)}")
        self.layout = layout
        if tokens_per_rank is not None and tokens_per_rank < 1:
            raise ValueError(f"scheduler.tokens_per_rank={tokens_per_rank}: must be at least 1, or null for no limit")
        self.tokens_per_rank = tokens_per_rank

    def plan(self, step: int, lengths: list[int], *, data: int, sequence: int) -> Plan:
        """Longest sequence first to the group with the fewest tokens so far, then first fit into its micro-steps.

        Raises ValueError when a sequence is longer than a group may hold.
        """
        capacity = None if self.tokens_per_rank is None else self.tokens_per_rank * sequence
        bins: list[list[list[int]]] = [[] for _ in range(data)]
        load = [0] * data
        for s in sorted(range(len(lengths)), key=lambda s: (-lengths[s], s)):
            if capacity is not None and lengths[s] > capacity:
                raise ValueError(
                    f"scheduler.tokens_per_rank={self.tokens_per_rank}: {sequence} ranks hold {capacity:,} tokens, "
                    f"a sequence has {lengths[s]:,}"
                )
            group = min(range(data), key=lambda g: (load[g], g))
            load[group] += lengths[s]
            fits = (b for b in bins[group] if capacity is None or sum(lengths[i] for i in b) + lengths[s] <= capacity)
            first = next(fits, None)
            if first is None:
                bins[group].append([s])
            else:
                first.append(s)
        micro_steps = []
        for m in range(max(len(held) for held in bins)):
            groups: list[Group] = []
            for g, held in enumerate(bins):
                ranks = tuple(range(g * sequence, (g + 1) * sequence))
                groups += self._group(ranks, sorted(held[m]), lengths) if m < len(held) else _idle(ranks)
            micro_steps.append(MicroStep(tuple(groups)))
        return Plan(step, tuple(lengths), tuple(micro_steps))

    def _group(self, ranks: tuple[int, ...], sequences: list[int], lengths: list[int]) -> list[Group]:
        total = sum(lengths[s] for s in sequences)
        return [Group(ranks, tuple(sequences), lay_out(total, len(ranks), self.layout))]


def checked_simulate(steps: int | None) -> int | None:
    """A number of steps to simulate. Raises ValueError for one out of range."""
    if steps is not None and not 1 <= steps <= 100_000:
        raise ValueError(f"scheduler.simulate={steps}: must be at least 1, and at most 100,000, or null")
    return steps


def lay_out(total: int, size: int, layout: str) -> tuple[tuple[Span, ...], ...]:
    """The spans of each of `size` ranks that hold `total` tokens. Raises ValueError where zigzag does not divide."""
    divides = total % (2 * size) == 0
    if layout == "zigzag" and not divides:
        raise ValueError(f"scheduler.layout=zigzag: {total:,} tokens do not divide into {2 * size} equal spans")
    if size > 1 and divides and layout != "contiguous":
        cuts = [total * i // (2 * size) for i in range(2 * size + 1)]
        pieces = list(zip(cuts, cuts[1:], strict=False))
        return tuple((pieces[r], pieces[-1 - r]) for r in range(size))
    cuts = [total * i // size for i in range(size + 1)]
    return tuple(((b, e),) if e > b else () for b, e in zip(cuts, cuts[1:], strict=False))


def _idle(ranks: tuple[int, ...]) -> list[Group]:
    return [Group((rank,), (), ((),)) for rank in ranks]
