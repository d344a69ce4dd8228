"""The static scheduler: the same sequence-parallel groups in every micro-step of every step."""

from parallel.schedule.plan import Group, MicroStep, Plan, Span


class Static:
    """`data` groups of `sequence` neighbouring ranks, contiguous spans that differ by at most one token.

    tokens_per_rank: the most tokens a rank may hold in one micro-step; null for no limit, which makes one micro-step.
    """

    def __init__(self, *, tokens_per_rank: int | None = None):
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
                groups += _group(ranks, sorted(held[m]), lengths) if m < len(held) else _idle(ranks)
            micro_steps.append(MicroStep(tuple(groups)))
        return Plan(step, tuple(lengths), tuple(micro_steps))


def _group(ranks: tuple[int, ...], sequences: list[int], lengths: list[int]) -> list[Group]:
    total, size = sum(lengths[s] for s in sequences), len(ranks)
    edges = [total * i // size for i in range(size + 1)]
    spans: tuple[tuple[Span, ...], ...] = tuple(
        ((begin, end),) if end > begin else () for begin, end in zip(edges, edges[1:], strict=False)
    )
    return [Group(ranks, tuple(sequences), spans)]


def _idle(ranks: tuple[int, ...]) -> list[Group]:
    return [Group((rank,), (), ((),)) for rank in ranks]
