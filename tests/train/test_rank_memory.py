"""Memory that is foretold from shapes, against a count of the tensors that ranks held: all cases are those of
`python -m tests.benchmarks.plan_memory`."""

import pytest

from parallel.schedule.step_memory import GRADIENTS
from tests.benchmarks import plan_memory


@pytest.mark.dist
def test_the_peak_of_a_step_is_within_a_tenth_of_what_ranks_held(tmp_path):
    """Two ranks: micro-steps whose gradients stay whole, and layers divided over tensor ranks."""
    micro, tensor = plan_memory.rows(["Llama, data 2, 2 micro-steps", "MoE, tensor 2"], tmp_path)
    assert abs(micro.off) < 0.1 and abs(tensor.off) < 0.1, (micro, tensor)
    without = micro.foretold - micro.parts[GRADIENTS]
    assert without < 0.9 * micro.counted, "a prediction without whole gradients would be noticed"
