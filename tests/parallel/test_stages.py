"""Cuts of layers into stages, and the waits of a pipeline's ranks, against exhaustive search and published formulas."""

from itertools import combinations

import numpy as np
import pytest

from parallel.pipeline.orders import bubble
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.schedule.stages import Action, check, cut, idle


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_no_cut_has_a_lighter_heaviest_stage(stages):
    rng = np.random.default_rng(stages)
    for _ in range(20):
        weights, head = rng.integers(1, 10, 7).tolist(), int(rng.integers(0, 20))
        found = cut(weights, stages, head=head)
        assert [i for layers in found for i in layers] == list(range(7))

        def heaviest(ends, weights=weights, head=head):
            parts = [sum(weights[a:b]) for a, b in zip((0, *ends), (*ends, 7), strict=True)]
            return max(*parts[:-1], parts[-1] + head, 0)

        best = min(heaviest(ends) for ends in combinations(range(1, 7), stages - 1))
        assert heaviest([layers.stop for layers in found[:-1]]) == best


def test_the_head_takes_layers_from_the_last_stage():
    assert cut([1.0] * 8, 2) == (range(4), range(4, 8))
    assert cut([1.0] * 8, 2, head=4.0) == (range(6), range(6, 8))
    with pytest.raises(ValueError, match="3 stages: must be at most the 2 layers"):
        cut([1.0, 1.0], 3)


@pytest.mark.parametrize(("ranks", "micro_steps"), [(2, 2), (2, 6), (4, 8)])
def test_the_bubble_of_even_stages_is_that_of_the_papers(ranks, micro_steps):
    """(S - 1) / (M + S - 1) of 1F1B, as many times less as there are stages a rank (2104.04473, section 2.2)."""
    costs = [(1.0, 2.0)]
    assert bubble("1f1b", ranks, costs * ranks, micro_steps) == pytest.approx((ranks - 1) / (micro_steps + ranks - 1))
    halves = [(0.5, 1.0)] * 2 * ranks
    assert bubble("interleaved", ranks, halves, micro_steps) == pytest.approx(
        (ranks - 1) / (2 * micro_steps + ranks - 1)
    )
    assert bubble("zero_bubble", ranks, costs * ranks, micro_steps) < bubble("1f1b", ranks, costs * ranks, micro_steps)


def test_a_heavy_stage_makes_the_others_wait():
    even, uneven = (bubble("1f1b", 2, [(1.0, 2.0), (last, 2 * last)], 4) for last in (1.0, 2.0))
    assert even == pytest.approx(0.2) and uneven == pytest.approx(1 - (12 + 24) / 2 / 27)


def test_ranks_that_wait_for_each_other_are_found():
    backward_first = {0: [Action("B", 0, 0), Action("F", 0, 0)], 1: [Action("F", 1, 0), Action("B", 1, 0)]}
    with pytest.raises(ValueError, match="waits for another"):
        idle(backward_first, [(1.0, 2.0)] * 2)


def plan(*groups: tuple[int, ...]) -> Plan:
    """A micro-step for each group of ranks, the others of which are idle."""
    ranks = {rank for group in groups for rank in group}
    steps = []
    for s, own in enumerate(groups):
        spans = tuple(((i, i + 1),) for i in range(len(own)))
        rest = tuple(Group((rank,), (), ((),)) for rank in sorted(ranks - set(own)))
        steps.append(MicroStep((Group(own, (s,), spans), *rest)))
    return Plan(0, tuple(len(group) for group in groups), tuple(steps))


@pytest.mark.parametrize(
    ("plan", "schedule", "ranks", "words"),
    [
        (plan((0, 1)), "1f1b", 2, "has 1 micro-step, must have at least 2"),
        (plan(*[(0,)] * 5), "interleaved", 2, "has 5 micro-steps, must have a multiple of 2"),
        (plan((0, 1), (0, 1), (0,)), "1f1b", 2, "must be the same in each of its micro-steps"),
    ],
)
def test_plans_that_no_pipeline_runs_are_refused(plan, schedule, ranks, words):
    with pytest.raises(ValueError, match=f"^parallel.pipeline={ranks}: .*{words}"):
        check(plan, schedule, ranks)


def test_idle_ranks_change_no_group():
    check(plan((0, 1), (2, 3), (0, 1), (0, 1)), "zero_bubble", 2)
