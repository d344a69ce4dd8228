"""Memory that is foretold from shapes, against a count of the tensors that ranks held: all cases are those of
`python -m tests.benchmarks.plan_memory`."""

import pytest

from parallel.schedule.step_memory import GRADIENTS, UPDATE
from tests.benchmarks import plan_memory
from train.rank_memory import TEACHER


@pytest.mark.dist
def test_the_peak_of_a_step_is_within_a_tenth_of_what_ranks_held(tmp_path):
    """Two ranks: micro-steps whose gradients stay whole, and halves of backward passes."""
    micro, halves = plan_memory.rows(["Llama, data 2, 2 micro-steps", "Llama, pipeline 2, zero bubble"], tmp_path)
    assert abs(micro.off) < 0.1 and abs(halves.off) < 0.1, (micro, halves)
    without = micro.foretold - micro.parts[GRADIENTS]
    assert without < 0.9 * micro.counted, "a prediction without whole gradients would be noticed"


@pytest.mark.dist
def test_what_muon_makes_in_a_step_is_counted(tmp_path):
    (muon,) = plan_memory.rows(["MoE, recompute selective, Muon"], tmp_path)
    assert abs(muon.off) < 0.02, muon
    assert muon.parts[UPDATE] > 0.5 * muon.counted


def test_a_teacher_beside_the_model_is_counted(tmp_path):
    (taught,) = plan_memory.rows(["Llama, a teacher's logits"], tmp_path)
    assert abs(taught.off) < 0.06 and taught.parts[TEACHER] > 0.15 * taught.counted, taught


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_every_case_is_within_a_tenth(tmp_path):
    for row in plan_memory.rows(list(plan_memory.CASES), tmp_path):
        assert abs(row.off) < 0.1, row
