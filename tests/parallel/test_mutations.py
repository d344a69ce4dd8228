"""Each mechanism, broken on purpose, must make the parity test fail: a test that cannot fail proves nothing.

One command runs them all: `make mutations`.
"""

import numpy as np
import pytest

from tests.mutations import MUTATIONS
from tests.parallel.test_parity import BATCH, unequal
from tests.parity import Sample, assert_close, spread, truth

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def want():
    return truth(BATCH, "fp64")


def broken(mutation: str, *args):
    MUTATIONS[mutation]()
    return spread(*args)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_mechanism_is_caught(run, want, mutation):
    results = run(4, broken, mutation, BATCH, unequal(), "fp64")
    with pytest.raises(AssertionError, match="error|loss"):
        for got in results:
            assert_close(got, want, "fp64")


def test_the_batch_has_what_the_mutations_need():
    """Otherwise a mutation could be caught by luck, or not at all when the batch changes."""
    assert len(BATCH) > 2 and isinstance(BATCH[0], Sample)
    assert any((np.diff(np.flatnonzero(s.positions == 0)) < 4).any() for s in BATCH)
