"""Schedulers side by side, and which of two `auto` takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parallel.schedule.adaptive.auto import Auto
from parallel.schedule.adaptive.compare import SCHEDULERS, compare, text
from parallel.schedule.adaptive.cost import Cluster, Costs, Model, Wire
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.adaptive.profiles import flexsp, flexsp_cluster, hybrid
from parallel.schedule.adaptive.rivals import BestFit, LongestFirst, WorkByPairs
from parallel.schedule.adaptive.search import TooLongError
from parallel.schedule.adaptive.simulate import seconds
from tests.parallel.test_adaptive import BATCHES, audited, published


def test_the_table_says_what_each_takes_and_what_does_not_fit():
    costs = published()
    rows = compare(costs, BATCHES[:2], ["adaptive", "all_ranks", "megatron"])
    assert [row.name for row in rows] == ["adaptive", "all_ranks", "megatron"]
    assert rows[1].seconds.tolist() == [seconds(costs, BestFit(costs, 64).pack(b), b) for b in BATCHES[:2]]
    assert rows[1].utilisation == pytest.approx(1.0) and rows[0].utilisation > rows[2].utilisation
    assert all(row.peak <= costs.cluster.memory for row in rows)
    table = text(rows, costs)
    assert len(table) == 5 and table[1].split()[:3] == ["adaptive", f"{rows[0].seconds.mean():.4g}", "1.000"]
    assert "room for 5,992 tokens" in table[-1] and "longest sequence that fits has 383,488" in table[-1]
    with pytest.raises(TooLongError):
        compare(costs, [[383_600]])


def test_a_rank_of_megatrons_rule_gets_work_by_pairs():
    """By hand, on 4 ranks of 10 tokens: 40 takes all of them. Of the rest, 8 makes 64 pairs on one rank, and so nothing
    smaller changes the largest work: 6 and 5 open a group each, 4 joins the first that has room for it, which is 6's.
    The rank that is left doubles the first of the smallest groups."""
    model = Model("m", flexsp("7b").layers, 1.0, 0.0, 1.0)
    costs = Costs(model, Cluster("c", 4, 10.0, {1: Wire(1e9)}))
    steps = WorkByPairs(costs).pack([8, 6, 40, 5, 4]).micro_steps
    assert [[(share.size, share.sequences) for share in shares] for shares in steps] == [
        [(4, (2,))],
        [(2, (0,)), (1, (1, 4)), (1, (3,))],
    ]


def test_idle_ranks_double_the_smallest_groups_or_all_ranks_take_one():
    model = Model("m", flexsp("7b").layers, 1.0, 0.0, 1.0)
    costs = Costs(model, Cluster("c", 8, 10.0, {1: Wire(1e9)}))
    # 40 on four ranks, 8 on one of the four others: doubled to two, then to four.
    assert [(s.first, s.size, s.sequences) for s in WorkByPairs(costs).pack([40, 8]).micro_steps[0]] == [
        (0, 4, (0,)),
        (4, 4, (1,)),
    ]


def test_megatrons_own_code_puts_500_short_ones_on_two_ranks():
    pytest.importorskip("megatron.core.pipeline_parallel.hybrid_cp_schedule")
    from parallel.schedule.adaptive.rivals import Balanced

    costs = published()
    packing = Balanced(costs, 5993).pack([90_000] * 2 + [45_000] + [22_000] * 2 + [11_000] * 7 + [640] * 500)
    packing.check(64, 512)
    assert max(len(share.sequences) for shares in packing.micro_steps for share in shares) >= 250


def _truths(model: Model, cluster: Cluster, seed: int) -> Costs:
    """What constants that are believed to be these might be: 10% off, each its own way."""
    rng = np.random.default_rng(seed)

    def off(value: float) -> float:
        return value * float(np.exp(0.1 * rng.standard_normal()))

    layers = tuple(replace(layer, pair=off(layer.pair), token=off(layer.token)) for layer in model.layers)
    wires = {size: Wire(off(wire.bandwidth)) for size, wire in cluster.wires.items()}
    return Costs(replace(model, layers=layers, launch=off(model.launch)), replace(cluster, wires=wires))


def test_auto_is_right_although_constants_are_ten_percent_off():
    right = []
    for kinds in ((0, 1), (3, 1), (1, 0)):
        model, cluster = hybrid(flexsp("7b"), *kinds), flexsp_cluster()
        costs = Costs(model, cluster)
        for i, lengths in enumerate(BATCHES[:3]):
            name, packing = Auto(costs).choose(lengths)
            truth = _truths(model, cluster, i)
            both = [Planner(costs).plan(lengths).packing, LongestFirst(costs).pack(lengths)]
            assert packing == both[name == "static"]
            right.append(seconds(truth, packing, lengths) <= 1.01 * min(seconds(truth, p, lengths) for p in both))
    assert np.mean(right) >= 0.95


def test_auto_takes_a_static_plan_where_nothing_is_gained():
    linear = Costs(hybrid(flexsp("7b"), 1, 0), flexsp_cluster())
    assert [Auto(linear).choose(lengths)[0] for lengths in BATCHES[:3]] == ["static"] * 3
    assert [Auto(published()).choose(lengths)[0] for lengths in BATCHES[:3]] == ["adaptive"] * 3


def test_every_scheduler_keeps_to_the_formulation():
    costs, lengths = published(), BATCHES[4]
    for name in set(SCHEDULERS) - {"megatron_balanced"}:
        packing = SCHEDULERS[name](costs).pack(lengths)
        packing.check(64, 512)
        assert audited(packing, lengths) == pytest.approx(1e3 * seconds(costs, packing, lengths))
