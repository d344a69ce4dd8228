"""A few of the plans of `make plans`, the same each time."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.parallel import fuzz

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def running():
    with fuzz.world() as running:
        yield running


@settings(
    max_examples=16,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(fuzz.cases())
def test_any_plan_that_passes_the_check_gives_the_numbers_of_one_process(running, case):
    assert fuzz.wrong(case, running) is None
