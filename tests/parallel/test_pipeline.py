"""Pipelines against one process: the loss, every gradient on every rank that holds it, and their norm."""

import math

import pytest

import parallel.pipeline.runner
import parallel.pipeline.stage
import train.optim.clip
from models.lm import LM
from parallel.pipeline.runner import Pipeline
from parallel.schedule.mesh import Mesh
from tests.parity import small_model, truth
from tests.pipelined import BATCH, Case, coupled_model, several, worst

pytestmark = pytest.mark.dist

TOLERANCE = 1e-10
TWO = {
    "1f1b, recomputed": Case(layers=(1, 3), remat="full"),
    "1f1b, coupled": Case(layers=(2, 4), build=coupled_model),
    "interleaved, coupled": Case("interleaved", (2, 1, 1, 2), build=coupled_model),
    "zero bubble": Case("zero_bubble"),
}
FOUR = {
    "data 2": Case(mesh=Mesh(pipeline=2, data=2), each=133),
    "sequence 2": Case(mesh=Mesh(pipeline=2, sequence=2), layers=(2, 4), build=coupled_model, each=70),
}
TWO_MORE = {
    "1f1b, kept whole": Case(reshard=False),
    "1f1b, selective": Case(remat="selective"),
    "interleaved, recomputed": Case("interleaved", (1, 1, 1, 1), remat="full"),
    "zero bubble, two stages a rank": Case("zero_bubble", (2, 1, 1, 2), build=coupled_model),
    "zero bubble, recomputed": Case("zero_bubble", remat="full"),
}
FOUR_MORE = {
    "sequence 2, recomputed": Case(mesh=Mesh(pipeline=2, sequence=2), each=70, remat="selective"),
    "sequence 2, zero bubble": Case("zero_bubble", mesh=Mesh(pipeline=2, sequence=2), each=70),
    "data 2, zero bubble": Case("zero_bubble", (2, 4), Mesh(pipeline=2, data=2), coupled_model, each=133),
    "sequence 2, interleaved": Case("interleaved", (1, 1, 1, 1), Mesh(pipeline=2, sequence=2), each=70),
    "replicas": Case(mesh=Mesh(pipeline=2, replicate=2), each=133),
    "experts on two ranks": Case(mesh=Mesh(pipeline=2, expert=2), each=133),
}
THREE = {  # of which the first and the last hold the embedding and the bounds
    "1f1b": Case(layers=(2, 2, 2), mesh=Mesh(pipeline=3), build=coupled_model, each=133),
    "zero bubble": Case("zero_bubble", (2, 2, 2), Mesh(pipeline=3), coupled_model, each=133),
}


@pytest.fixture(scope="module")
def wanted():
    return {build: truth(BATCH, "fp64", build=build) for build in (small_model, coupled_model)}


def hold(run, wanted, cases, world):
    results = run(world, several, list(cases.values()))
    for i, (name, case) in enumerate(cases.items()):
        found = worst([rank[i] for rank in results], wanted[case.build])
        name_of_worst = max(found, key=lambda key: found[key])
        assert found[name_of_worst] <= TOLERANCE, (name, name_of_worst, found[name_of_worst])
        nats = {rank[i].nats for rank in results}
        assert len(nats) == 1 and math.isfinite(nats.pop())


@pytest.mark.slow
def test_two_ranks_equal_one_process(run, wanted):
    hold(run, wanted, TWO, 2)


@pytest.mark.slow
def test_four_ranks_equal_one_process(run, wanted):
    hold(run, wanted, FOUR, 4)


@pytest.mark.slow
def test_more_of_two_ranks(run, wanted):
    hold(run, wanted, TWO_MORE, 2)


@pytest.mark.slow
def test_more_of_four_ranks(run, wanted):
    hold(run, wanted, FOUR_MORE, 4)


@pytest.mark.slow
def test_three_ranks(run, wanted):
    hold(run, wanted, THREE, 3)


def keep_shared_gradients_apart():
    Pipeline._sum_shared = lambda self: None


def drop_what_is_handed_on():
    honest = LM.part

    def part(self, layers, tokens, seq, targets=None, passed=None, ahead=None):
        if passed is not None and len(passed) > 1:
            passed = passed.clone()
            passed[1:] = 0
        return honest(self, layers, tokens, seq, targets, passed, ahead)

    LM.part = part


def lose_the_losses_of_inner_stages():
    honest = parallel.pipeline.stage.PipelineStage.backward_one_chunk

    def backward(self, m, full_backward=True, **more):
        if not self.is_last:
            self.losses.pop(m, None)
        honest(self, m, full_backward, **more)

    parallel.pipeline.stage.PipelineStage.backward_one_chunk = backward


def average_routers_over_the_layers_of_a_stage():
    honest = LM.part

    def part(self, layers, *args):
        self.routed = None
        return honest(self, layers, *args)

    LM.part = part


def split_a_backward_pass_with_sharded_weights():
    parallel.pipeline.runner.whole_weights = lambda model: None


def count_a_shared_weight_twice():
    honest = train.optim.clip._total

    def total(parameters, *rest):
        for parameter in parameters:
            parameter.elsewhere = False
        return honest(parameters, *rest)

    train.optim.clip._total = total


BROKEN = {
    keep_shared_gradients_apart: "1f1b, coupled",
    drop_what_is_handed_on: "1f1b, coupled",
    lose_the_losses_of_inner_stages: "1f1b, coupled",
    average_routers_over_the_layers_of_a_stage: "1f1b, coupled",
    count_a_shared_weight_twice: "1f1b, coupled",
    split_a_backward_pass_with_sharded_weights: "zero bubble",
}


@pytest.mark.slow  # run by `make mutations`
@pytest.mark.parametrize("mutation", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_pipeline_is_caught(run, wanted, mutation):
    case = TWO[BROKEN[mutation]]
    try:
        results = run(2, several, [case], mutation)
    except AssertionError as error:
        assert "failed" in str(error) or "died" in str(error)
    else:
        found = worst([rank[0] for rank in results], wanted[case.build])
        assert max(found.values()) > 1e-6
