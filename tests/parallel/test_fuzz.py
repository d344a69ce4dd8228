"""A few of the plans of `make plans`, the same each time: hybrids, some mixers alone, and every transport."""

from dataclasses import replace
from itertools import cycle

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.parallel import fuzz

pytestmark = pytest.mark.dist
MODELS = [*fuzz.HYBRIDS, *fuzz.ALONE[::3]]  # one of three alone: a world's matrix has them all


@pytest.fixture(scope="module")
def running():
    with fuzz.world() as running:
        yield running


@pytest.fixture(scope="module")
def turns():
    return zip(cycle(MODELS), cycle(fuzz.EFFECTS), cycle(fuzz.KEYS), strict=True)


@pytest.mark.slow
@settings(
    max_examples=len(MODELS) + 1,  # the first is the smallest there is
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(fuzz.cases())
def test_any_plan_that_passes_the_check_gives_the_numbers_of_one_process(running, turns, case):
    model, effects, keys = next(turns)
    assert fuzz.wrong(replace(case, model=model, effects=effects, keys=keys), running) is None
