"""Spans in time: a group's packed sequence, one stretch after another, each over all ranks of the group.

All groups of a micro-step take equally many, since every rank takes part in what shards the weights; a group with less
to do begins later, and idles until then.
"""

from collections.abc import Iterable

from parallel.schedule.plan import Group, MicroStep, Span

Shape = tuple[int, int]  # spans of a rank, and the tokens of each


def count(micro: MicroStep, lengths: tuple[int, ...], tokens: int) -> int:
    """Counts the spans in time of a micro-step, each of at most `tokens` tokens a rank."""
    return max(-(-_total(group, lengths) // (tokens * len(group.ranks))) or 1 for group in micro.groups)


def in_time(group: Group, lengths: tuple[int, ...], spans: int) -> list[Group]:
    """The group's sequences as `spans` groups, one after another, of about equally many tokens.

    In each, ranks hold one span apiece, in their order. Only a group of fewer tokens than ranks leaves ranks without.
    """
    total, size = _total(group, lengths), len(group.ranks)
    used = max(1, min(spans, total // size))
    idle = [Group(group.ranks, group.sequences, ((),) * size)] * (spans - used)
    cuts = [total * i // used for i in range(used + 1)]
    return idle + [Group(group.ranks, group.sequences, _over(size, b, e)) for b, e in zip(cuts, cuts[1:], strict=False)]


def shapes(groups: Iterable[Group]) -> tuple[Shape, ...]:
    """The spans of a rank and their length, of all ranks, each pair once; an idle one has a masked token."""
    sizes = {(len(held), held[0][1] - held[0][0]) if held else (1, 1) for group in groups for held in group.spans}
    return tuple(sorted(sizes))


def _over(size: int, begin: int, end: int) -> tuple[tuple[Span, ...], ...]:
    cuts = [begin + (end - begin) * i // size for i in range(size + 1)]
    return tuple(((b, e),) if e > b else () for b, e in zip(cuts, cuts[1:], strict=False))


def _total(group: Group, lengths: tuple[int, ...]) -> int:
    return sum(lengths[s] for s in group.sequences)
