"""The exact planner against all plans of a few sequences, and the fast planner against the exact one. Needs highspy
(the extra `planner`), except for the buckets."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule.adaptive.buckets import optimal_buckets, rounded_up
from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.adaptive.profiles import flexsp, flexsp_cluster
from parallel.schedule.adaptive.simulate import seconds, timing
from tests.parallel.test_adaptive import BATCHES, LENGTHS, _best, _small, published


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=10), st.integers(1, 5))
def test_buckets_add_the_fewest_tokens(lengths, most):
    bounds = optimal_buckets(lengths, most)
    assert len(bounds) <= most and bounds == sorted(set(bounds))
    rounded = rounded_up(lengths, bounds)
    assert all(r >= n for r, n in zip(rounded, lengths, strict=True))
    values = sorted(set(lengths))
    fewest = min(
        sum(min(b for b in (*chosen, values[-1]) if b >= n) for n in lengths)
        for chosen in itertools.combinations(values, min(most, len(values)) - 1)
    )
    assert sum(rounded) == fewest


def test_more_buckets_never_add_tokens_and_none_is_refused():
    added = [sum(rounded_up(LENGTHS[:512], optimal_buckets(LENGTHS[:512], b))) for b in (1, 2, 3, 5, 8, 16)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(added))
    with pytest.raises(ValueError, match="0 buckets"):
        optimal_buckets([1], 0)


def _published(ranks: int) -> Costs:
    """7B with the states that 64 ranks would leave on each."""
    model = flexsp("7b")
    return Costs(replace(model, state_bytes=model.state_bytes * ranks / 64), flexsp_cluster(ranks))


@pytest.mark.parametrize("seed", range(4))
def test_exact_is_the_best_of_all_plans(seed):
    pytest.importorskip("highspy")
    from parallel.schedule.adaptive.exact import ExactPlanner

    rng = np.random.default_rng(seed)
    ranks, room = ((2, 40.0), (4, 40.0), (2, 130.0), (4, 130.0))[seed]
    lengths = rng.integers(1, min(ranks * int(room), 110), 4).tolist()
    costs = _small(ranks, room)
    found = ExactPlanner(costs, more=3).plan(lengths)
    assert found.closed and found.seconds == pytest.approx(_best(costs, lengths), rel=1e-3)
    assert found.seconds == pytest.approx(seconds(costs, found.packing, lengths))


def test_exact_finds_what_a_worse_start_does_not():
    pytest.importorskip("highspy")
    from parallel.schedule.adaptive import exact

    costs, lengths = _small(4, 40.0), [20, 24, 56, 22]
    worse = Planner(costs, quantum=64).plan(lengths).packing  # lengths are told apart no more
    packing, _, done = exact._Programme(costs, [20, 22, 24, 56], [1] * 4, len(worse.micro_steps), 20.0).solve(
        worse, lengths, 10.0, 1e-6
    )
    assert done and packing is not None
    assert seconds(costs, packing, lengths) <= seconds(costs, worse, lengths)


@pytest.mark.parametrize("ranks,many,seed", [(4, 15, 1), (8, 30, 2), (16, 15, 3)])
def test_fast_is_within_three_percent_of_exact_where_that_closes(ranks, many, seed):
    pytest.importorskip("highspy")
    from parallel.schedule.adaptive.exact import ExactPlanner

    costs = _published(ranks)
    fitting = LENGTHS[LENGTHS <= costs.room(0, 0, ranks)]
    drawn = np.random.default_rng(seed).choice(fitting, many).tolist()
    padded = rounded_up(drawn, optimal_buckets(drawn, 16))
    exact = ExactPlanner(costs, gap=5e-3).plan(drawn)
    exact.packing.check(ranks, many)
    assert timing(costs, exact.packing, padded).peak.max() <= costs.cluster.memory
    fast = Planner(costs, quantum=1).plan(padded)
    assert exact.bound <= exact.seconds <= fast.seconds * (1 + 1e-9)
    assert fast.bound <= exact.bound * (1 + 1e-9)
    assert exact.closed and fast.seconds <= 1.03 * exact.seconds


@pytest.mark.parametrize("seed", range(6))
def test_the_integer_bound_is_below_every_plan_and_above_the_quick_one(seed):
    pytest.importorskip("highspy")
    from parallel.schedule.adaptive.offline import integer_bound

    rng = np.random.default_rng(seed)
    costs = _small(4, (40.0, 130.0)[seed % 2])
    lengths = rng.integers(1, 110, 4).tolist()
    values, counts = np.unique(lengths, return_counts=True)
    plan = Planner(costs, quantum=1).plan(lengths)
    bound = integer_bound(costs, values[::-1].tolist(), counts[::-1].tolist(), plan.seconds)
    assert plan.bound * (1 - 1e-9) <= bound <= _best(costs, lengths) * (1 + 1e-6)


def test_the_integer_bound_is_close_on_a_published_batch(monkeypatch):
    """By its programmes, beside a quick bound that is far."""
    pytest.importorskip("highspy")
    from parallel.schedule.adaptive import offline

    costs = published()
    plan = Planner(costs).plan(BATCHES[1])
    values, counts = np.unique(BATCHES[1], return_counts=True)
    far = 0.9 * plan.bound
    monkeypatch.setattr(offline, "lower_bound", lambda *_: far)
    bound = offline.integer_bound(costs, values[::-1].tolist(), counts[::-1].tolist(), plan.seconds)
    assert bound <= plan.seconds and plan.seconds / bound - 1 < 0.05 < plan.seconds / far - 1
