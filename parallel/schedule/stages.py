"""Stages of a pipeline: which layers each has, and how long ranks wait for each other. Pure Python.

Layers are cut into runs of neighbours so that the heaviest run is as light as can be; of such cuts the one with the
least sum of squares is taken, so that the others are even, too. The last run carries the head beside its layers.

A rank that has several stages has them a whole round apart: with 2 ranks and 4 stages, rank 0 has stages 0 and 2. That
is what "interleaved" schedules need (Narayanan et al. 2021, 2104.04473, section 2.2).
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

from parallel.schedule.plan import Plan

PipelineScheduleName = Literal["1f1b", "interleaved", "zero_bubble"]
PIPELINE_SCHEDULES = get_args(PipelineScheduleName)


class Action(NamedTuple):
    """One computation of a rank: F forward, B backward, or its halves I (of inputs) and W (of weights)."""

    kind: str
    stage: int
    micro_step: int


def cut(weights: Sequence[float], stages: int, *, head: float = 0.0) -> tuple[range, ...]:
    """The layers of each stage. weights: of each layer, its work. head: of what the last stage has beside layers.

    Raises ValueError for more stages than layers.
    """
    count = len(weights)
    if stages > count:
        raise ValueError(f"{stages} stages: must be at most the {count} layers")
    sums = [0.0, *accumulate(weights)]

    @cache
    def best(begin: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(heaviest, sum of squares, ends) of the layers from `begin` in so many stages."""
        if left == 1:
            own = sums[count] - sums[begin] + head
            return own, own**2, (count,)
        sizes = []
        for end in range(begin + 1, count - left + 2):
            own, (most, squares, ends) = sums[end] - sums[begin], best(end, left - 1)
            sizes.append((max(own, most), own**2 + squares, (end, *ends)))
        return min(sizes)

    ends = best(0, stages)[2]
    return tuple(range(begin, end) for begin, end in zip((0, *ends), ends, strict=False))


def given(layers: Sequence[int]) -> tuple[range, ...]:
    """The stages of so many layers each."""
    ends = list(accumulate(layers))
    return tuple(range(end - size, end) for end, size in zip(ends, layers, strict=True))


def refusal(schedule: str, ranks: int, micro_steps: int) -> str | None:
    """Says what keeps a schedule from so many micro-steps, as the end of a sentence; None where nothing does."""
    many = f"has {micro_steps} micro-step{'s' * (micro_steps != 1)}"
    if micro_steps < ranks:
        return f"{many}, must have at least {ranks} (train.batch_tokens, scheduler.tokens_per_rank)"
    rounds = micro_steps // ranks
    if schedule != "1f1b" and micro_steps % rounds:
        return f"{many}, must have a multiple of {rounds} with parallel.pipeline_schedule={schedule}"
    return None


def in_flight(actions: Sequence[Action], layers: Sequence[int]) -> set[tuple[int, int]]:
    """The layers whose activations a rank holds while it computes, those in hand among them, and the layers of which
    it holds what half of a backward pass has left, one for each micro-step; at each of its computations.

    actions: of the rank, in turn. layers: of each stage. The first stage has no gradient of inputs to compute, so it
    holds its activations until the second half.
    """
    held, halved, pairs = 0, 0, set[tuple[int, int]]()
    for kind, stage, _ in actions:
        count, halves = layers[stage], stage > 0
        if kind == "F":
            held += count
        pairs.add((held, halved))
        if kind == "I" and halves:
            held, halved = held - count, halved + count
        elif kind == "W" and halves:
            halved -= count
        elif kind in ("B", "W"):
            held -= count
    return pairs


def idle(orders: Mapping[int, Sequence[Action]], costs: Sequence[tuple[float, float]]) -> list[float]:
    """The share of a step that each rank waits for others, were messages free.

    orders: each rank's computations in turn. costs: of each stage, the time of a forward and of a backward pass; each
    half of a backward pass takes half of it. Raises ValueError for orders in which ranks wait for ever.
    """
    done: dict[Action, float] = {}
    clocks, places = dict.fromkeys(orders, 0.0), dict.fromkeys(orders, 0)
    busy = dict.fromkeys(orders, 0.0)
    last, moved = len(costs) - 1, True
    while moved:
        moved = False
        for rank, actions in orders.items():
            while places[rank] < len(actions) and (ready := _ready(actions[places[rank]], done, last)) is not None:
                action = actions[places[rank]]
                forward, backward = costs[action.stage]
                takes = {"F": forward, "B": backward}.get(action.kind, backward / 2)
                clocks[rank] = done[action] = max(clocks[rank], ready) + takes
                busy[rank] += takes
                places[rank] += 1
                moved = True
    if any(places[rank] < len(actions) for rank, actions in orders.items()):
        raise ValueError("each rank of the pipeline waits for another")
    ends = max(clocks.values())
    return [1 - busy[rank] / ends for rank in sorted(orders)]


def _ready(action: Action, done: Mapping[Action, float], last: int) -> float | None:
    """The time at which an action can begin; None where what it needs is not done."""
    kind, stage, m = action
    if kind == "F":
        return 0.0 if not stage else done.get(Action("F", stage - 1, m))
    if kind == "W":
        return done.get(Action("I", stage, m))
    if stage == last:
        return done.get(Action("F", stage, m))
    ends = [done[a] for half in "BI" if (a := Action(half, stage + 1, m)) in done]
    return ends[0] if ends else None


def check(plan: Plan, schedule: str, ranks: int) -> None:
    """Raises ValueError for a plan that cannot run in a pipeline of so many ranks."""
    if (why := refusal(schedule, ranks, len(plan.micro_steps))) is not None:
        many = f"{len(plan.lengths)} sequence{'s' * (len(plan.lengths) != 1)}"
        raise ValueError(f"parallel.pipeline={ranks}: a step of {many} {why}")
    groups = {group.ranks for micro in plan.micro_steps for group in micro.groups if group.sequences}
    members = [rank for group in groups for rank in group]
    if len(members) != len(set(members)):
        raise ValueError(
            f"parallel.pipeline={ranks}: the sequence groups of a step must be the same in each of its micro-steps"
        )
