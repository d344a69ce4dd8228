"""A step's collectives, held to the types of `parallel.collective_types`. `make types` runs a world of 1,024 ranks."""

import importlib
import pkgutil

import pytest

import parallel
from parallel.collective_types import FUNCTIONS, UNTYPED

pytest.importorskip("spmd_types")

from spmd_types import assert_type, rules

from tests import spmd
from tests.spmd_step import LETTERS, Step, functions

CHEAP = ("gradients of whole weights are not summed over tensor ranks", "the loss is summed before its gradient is")
OTHERS = sorted({*spmd.mutations()} - {*CHEAP})


def test_a_right_step_has_types():
    assert spmd.small_error(None) is None


@pytest.mark.parametrize("name", [*CHEAP, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_fault_is_a_type_error(name):
    mutation = spmd.mutations()[name]
    said = spmd.small_error(mutation)
    assert said is not None and mutation.error in said


@pytest.mark.slow
@pytest.mark.parametrize("name", spmd.unseen())
def test_types_do_not_see_which_numbers_are_meant(name):
    """The page says so; once a type does see it, the page is wrong."""
    assert spmd.small_error(spmd.unseen()[name]) is None


def test_every_function_that_sends_is_declared():
    for module in pkgutil.walk_packages(parallel.__path__, "parallel."):
        importlib.import_module(module.name)
    ours = {name for name in functions() if name.startswith("parallel.")}
    assert ours == {*FUNCTIONS, *UNTYPED} and not FUNCTIONS.keys() & UNTYPED.keys()


def test_each_step_is_one_that_the_package_knows_and_so_is_its_transpose():
    axis = Step(spmd.SMALL).axes["tensor"]
    for step in {step for function in FUNCTIONS.values() for step in function.steps}:
        assert step.transposed.transposed == step
        for each in (step, step.transposed):
            value = rules.NdimWithSpmdType(3)
            assert_type(value, {axis: LETTERS[each.before]})
            rule = getattr(rules, each.kind.replace("-", "_"))
            rule(value, axis, src=LETTERS[each.before], dst=LETTERS[each.after])
