"""Ten steps of AdamW on a full hybrid, sharded, recomputed and accumulated, against one process (T12, T14)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from models.axes import declarations, initialise
from models.sequence import Whole
from parallel.collectives import LEDGER
from parallel.mesh import Groups, everyone
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.plan import Plan
from parallel.sequence.attention import GatherKeys, Ring
from parallel.sequence.states import AllScan, GatherEffects
from tests.parallel.test_parity import BATCH, static, unequal
from tests.parity import BALANCE, DTYPE, Sample, assert_close, small_model, spread, truth
from train.execute import Executor
from train.loss import sums
from train.optim.adamw import AdamW
from train.optim.build import build_optimizer
from train.optim.clip import clip

pytestmark = pytest.mark.dist

STEPS, CLIP = 10, 1.0
LAYOUTS: dict[str, tuple[int, list[Plan], str, Any, Any]] = {
    "1 rank, accumulated": (1, [static(1, 1, 140)], "full", GatherEffects(), GatherKeys()),
    "4 ranks, gather": (4, [static(1, 4, 60), unequal(), static(2, 2, 80)], "full", GatherEffects(), GatherKeys()),
    "4 ranks, allscan and ring": (4, [unequal(), static(1, 4)], "selective", AllScan(2), Ring()),
}
Parameters = dict[str, np.ndarray]


def batch(step: int) -> list[Sample]:
    """Other tokens at every step, in documents of the same lengths, so that a plan serves all steps."""
    return [Sample(s.documents, seed=100 * step + s.seed, masked=s.masked) for s in BATCH]


def descend(
    kind: type[Optimizer], model: nn.Module, declared: dict, accumulate: Callable[[int], None], clipped: Any
) -> None:
    """Ten steps of AdamW from the gradients that `accumulate(step)` leaves in the model, each `clipped`."""
    settings = {"lr": 5e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    steps = build_optimizer(partial(kind, **settings), model, declared)
    for step in range(STEPS):
        accumulate(step)
        clipped()
        steps.step()
        steps.zero_grad()


def alone(precision: str) -> tuple[Parameters, Parameters]:
    """The parameters before and after, of the whole model in one process, a sequence at a time."""
    model = initialise(small_model().to(DTYPE[precision]), seed=1)
    model.compute = DTYPE[precision]
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}

    def accumulate(step: int) -> None:
        samples = batch(step)
        targets = sum(int((s.targets != -100).sum()) for s in samples)
        tokens = sum(len(s.tokens) for s in samples)
        for s in samples:
            seq = Whole.of(torch.from_numpy(s.positions)[None])
            part = sums(model(torch.from_numpy(s.tokens)[None], seq), torch.from_numpy(s.targets)[None])
            part.objective(targets=targets, tokens=tokens, balance_weight=BALANCE).backward()

    clipped = partial(nn.utils.clip_grad_norm_, list(model.parameters()), CLIP)
    descend(torch.optim.AdamW, model, declarations(model), accumulate, clipped)
    return before, {name: p.detach().numpy() for name, p in model.named_parameters()}


def together(name: str, precision: str) -> Parameters:
    """The same on this world: sharded, recomputed, along plans that take turns; as this rank gathers them."""
    _, plans, remat, effects, keys = LAYOUTS[name]
    groups, mesh = Groups(), everyone(torch.device("cpu"))
    with torch.device("meta"):
        model = small_model()
    model.compute = DTYPE[precision]
    declared = declarations(model)
    parallelise(model, mesh, seed=1, dtype=DTYPE[precision], remat=remat, reshard_after_forward=True)
    executor = Executor(model, groups, torch.device("cpu"), effects, keys, BALANCE)
    clipped = partial(clip, model, groups.world_comm, largest=CLIP, each=None, value=None)
    descend(AdamW, model, declared, lambda step: executor.train(plans[step % len(plans)], batch(step)), clipped)
    return {parameter_name(n): p.full_tensor().detach().numpy() for n, p in model.named_parameters()}


def distance(a: Parameters, b: Parameters) -> float:
    return float(np.sqrt(sum(np.linalg.norm(a[name].astype(np.float64) - b[name]) ** 2 for name in b)))


@pytest.fixture(scope="module")
def descended():
    return {precision: alone(precision) for precision in DTYPE}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_after_ten_steps_in_fp64(run, descended, name):
    before, want = descended["fp64"]
    for got in run(LAYOUTS[name][0], together, name, "fp64"):
        assert got.keys() == want.keys()
        for key, b in want.items():
            assert np.linalg.norm(got[key] - b) <= 1e-9 * np.linalg.norm(b), key
            assert np.linalg.norm(b - before[key]) > 1e-4 * np.linalg.norm(b), f"{key} has not moved"


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_in_fp32_are_no_further_from_fp64_than_twice_one_process(run, descended, name):
    exact, rounded = descended["fp64"][1], descended["fp32"][1]
    allowed = 2 * distance(rounded, exact)
    assert allowed > 0
    for got in run(LAYOUTS[name][0], together, name, "fp32"):
        assert distance(got, exact) <= allowed


def reductions(plan: Plan) -> tuple[tuple[float, Parameters], int]:
    """Loss and gradients, and how often gradients of sharded weights were reduced."""
    LEDGER.take()
    got = spread(BATCH, plan, "fp64")
    _, calls = LEDGER.take()
    return got, sum(count for entry, count in calls.items() if entry.purpose == "weights gradient")


def test_accumulated_gradients_are_reduced_once(run):
    """As many reductions with three micro-steps as with one: the first two keep their gradients to themselves."""
    plans = [static(1, 2), static(1, 2, 69)]
    assert [len(plan.micro_steps) for plan in plans] == [1, 3]
    want, counts = truth(BATCH, "fp64"), []
    for plan in plans:
        for got, calls in run(2, reductions, plan):
            assert_close(got, want, "fp64")
            counts.append(calls)
    assert counts[0] > 0 and len(set(counts)) == 1
