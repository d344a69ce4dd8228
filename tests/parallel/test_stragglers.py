"""A rank that becomes slow gets less work within 20 steps; noise changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.packing import Packing
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.adaptive.profiles import flexsp, flexsp_cluster
from parallel.schedule.adaptive.simulate import seconds
from parallel.schedule.adaptive.stragglers import Speeds
from tests.parallel.test_adaptive import BATCHES


def _computing(costs: Costs, packing: Packing, lengths: list[int]) -> np.ndarray:
    """Seconds of each rank, at speed 1."""
    found = np.zeros(costs.cluster.ranks)
    for shares in packing.micro_steps:
        for share in shares:
            own = costs.computing([lengths[s] for s in share.sequences]).sum() / share.size
            found[share.first : share.first + share.size] += own
    return found


@pytest.mark.parametrize("slow", [0.5, 0.7])
def test_half_of_the_loss_is_recovered_within_20_steps(slow):
    """Of a delay proportional to the rank's tokens, from step 3 on, with 3% of noise."""
    cluster, model, rng = flexsp_cluster(), flexsp("7b"), np.random.default_rng(0)
    true = np.ones(64)
    speeds, costs, lines, lost = Speeds(64), Costs(model, cluster), [], []
    for step in range(24):
        if step == 3:
            true[17] = slow
        lengths = BATCHES[step % 2 * 2][:256]
        packing = Planner(costs).plan(lengths).packing
        truth = Costs(model, replace(cluster, speeds=tuple(true)))
        free = Planner(Costs(model, cluster)).plan(lengths)
        known = seconds(truth, free.packing, lengths)  # what a plan that knows nothing takes
        lost.append((seconds(truth, packing, lengths) - free.seconds) / max(known - free.seconds, 1e-9))
        work = _computing(costs, packing, lengths)
        if line := speeds.observe(work, work / true * (1 + 0.03 * rng.standard_normal(64))):
            lines.append((step, line))
            costs = Costs(model, replace(cluster, speeds=tuple(speeds.believed)))
    assert lines and 3 < lines[0][0] < 23 and "rank 17 at" in lines[0][1]
    assert np.mean(lost[-4:]) <= 0.5
    assert speeds.believed[17] == pytest.approx(slow, rel=0.15)


def test_noise_changes_nothing_and_a_rank_that_recovers_is_believed_again():
    rng, speeds = np.random.default_rng(1), Speeds(8)
    for _ in range(200):
        assert speeds.observe(np.ones(8), 1 + 0.05 * np.abs(rng.standard_normal(8))) is None
    took = np.ones(8)
    took[2] = 3.0
    told = [speeds.observe(np.ones(8), took) for _ in range(20)]
    assert sum(line is not None for line in told) <= 3 and speeds.believed[2] < 0.5
    told = [speeds.observe(np.ones(8), np.ones(8)) for _ in range(30)]
    assert any(told) and speeds.believed[2] > 0.85


def test_a_rank_without_work_says_nothing_of_its_speed():
    speeds = Speeds(2)
    for _ in range(20):
        assert speeds.observe([1.0, 0.0], [1.0, 5.0]) is None
    assert speeds.observe([0.0, 0.0], [0.0, 0.0]) is None and speeds.believed.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="for 2 ranks"):
        speeds.observe([1.0], [1.0])
    with pytest.raises(ValueError, match="2 measured times"):
        speeds.observe([1.0, 1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="patience=0"):
        Speeds(2, patience=0)
