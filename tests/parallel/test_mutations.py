"""Each mechanism, broken on purpose, must make the parity test fail: a test that cannot fail proves nothing.

One command runs them all: `make mutations`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.models import test_mixers, test_recurrence
from tests.mutations import ALGEBRA, CARRIED, MUTATIONS
from tests.parallel import matrix
from tests.parallel.test_parity import BATCH, unequal
from tests.parity import TOLERANCE, Sample, assert_close, spread, truth

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def want():
    return truth(BATCH, "fp64")


ROOMS = ("models", "parallel", "train")


@contextmanager
def undone() -> Iterator[None]:
    """Gives every name of our modules and of their classes its value back."""
    modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in ROOMS]
    classes = [c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__]
    before = [(owner, dict(vars(owner))) for owner in (*modules, *classes)]
    try:
        yield
    finally:
        for owner, names in before:
            for name, value in names.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


def each_broken(*args):
    """Nothing broken, then each mutation, in one world: a world costs as much as a pass."""
    found = {}
    for name, mutate in {"nothing": lambda: None, **MUTATIONS, "nothing again": lambda: None}.items():
        with undone():
            mutate()
            found[name] = spread(*args)
    return found


@pytest.fixture(scope="module")
def passes(run):
    return run(4, each_broken, BATCH, unequal(), "fp64")


@pytest.mark.slow  # run by `make mutations`
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_mechanism_is_caught(passes, want, mutation):
    with pytest.raises(AssertionError, match="error|loss"):
        for got in passes:
            assert_close(got[mutation], want, "fp64")


@pytest.mark.slow  # run by `make mutations`
@pytest.mark.parametrize("nothing", ["nothing", "nothing again"])
def test_no_pass_is_caught_where_nothing_is_broken(passes, want, nothing):
    for got in passes:
        assert_close(got[nothing], want, "fp64")


def test_the_batch_has_what_the_mutations_need():
    """Otherwise a mutation could be caught by luck, or not at all when the batch changes."""
    assert len(BATCH) > 2 and isinstance(BATCH[0], Sample)
    assert any((np.diff(np.flatnonzero(s.positions == 0)) < 4).any() for s in BATCH)


def caught(mutation: str | None) -> list[str]:
    """The checks of rules and mixers, on one decay per channel and on one dense transition, that fail in here."""
    if mutation is not None:
        ALGEBRA[mutation]()
    loop = test_recurrence.test_outputs_state_and_gradients_equal_the_token_loop
    checks = {
        "loop": lambda rule, mixer: [loop(rule, 150, where, 0.3) for where in ("none", "many")],
        "compose": lambda rule, mixer: test_recurrence.test_effects_of_three_spans_compose_to_the_effect_of_the_whole(
            rule
        ),
        "spans": lambda rule, mixer: test_mixers.test_any_split_into_spans_equals_the_whole((mixer, {})),
        "packed": lambda rule, mixer: test_mixers.test_packed_documents_equal_documents_alone((mixer, {})),
    }
    failed = []
    for rule, mixer in (("gla", "gla"), ("gated_delta_rule", "gated_deltanet")):
        for name, check in checks.items():
            try:
                check(rule, mixer)
            except AssertionError:
                failed.append(f"{rule} {name}")
    return failed


def every_algebra_broken() -> dict[str, list[str]]:
    found = {}
    for name in ("nothing", *ALGEBRA, "nothing again"):
        with undone():
            found[name] = caught(name if name in ALGEBRA else None)
    return found


@pytest.fixture(scope="module")
def failing(run):
    (found,) = run(1, every_algebra_broken)
    return found


@pytest.mark.parametrize("nothing", ["nothing", "nothing again"])
def test_nothing_is_caught_where_nothing_is_broken(failing, nothing):
    assert failing[nothing] == []


@pytest.mark.parametrize("mutation", ALGEBRA)
def test_a_broken_algebra_is_caught_in_one_process(failing, mutation):
    assert failing[mutation]


def unnoticed(run, cells: list[matrix.Cell], mutation=None) -> list[matrix.Cell]:
    """Which of these cells, all on four ranks, are within their tolerance on every rank."""
    results = run(4, matrix.run_cells, cells, matrix.truths(cells), before=mutation)
    return [
        cell
        for cell, found in zip(cells, zip(*results, strict=True), strict=True)
        if all(error <= TOLERANCE[cell.precision] for errors in found for error in errors.values())
    ]


def rows(mutation: str) -> list[matrix.Cell]:
    """Its mixers over every transport, on four ranks."""
    broken = CARRIED[mutation]
    wanted = (broken.layout, broken.packing, 4, broken.precision)
    return [cell for cell in matrix.cells() if cell.mixer in broken.mixers and cell[2:] == wanted]


@pytest.mark.slow  # run by `make mutations`
@pytest.mark.parametrize("mutation", CARRIED)
def test_what_is_broken_between_ranks_turns_every_transport_red(run, mutation):
    cells = rows(mutation)
    mixers = CARRIED[mutation].mixers  # two heads of latents are too few for Ulysses on four ranks
    assert {cell.transport for cell in cells} == {
        cell.transport for cell in matrix.cells() if cell.mixer in mixers and cell.ranks == 4
    }
    assert unnoticed(run, cells, CARRIED[mutation].by) == []


@pytest.mark.slow  # run by `make mutations`
def test_no_transport_is_red_where_nothing_is_broken(run):
    cells = sorted({cell for mutation in CARRIED for cell in rows(mutation)})
    assert unnoticed(run, cells) == cells
