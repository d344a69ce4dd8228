"""Delayed scales over three steps on two ranks, which share sequences or shards of weights, against one process."""

from unittest.mock import patch

import numpy as np
import pytest
import torch

from models import delayed_scaling
from models.axes import initialise
from models.lm import LM
from models.sequence import Whole
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Plan
from parallel.sequence.attention import GatherKeys
from parallel.sequence.states import GatherEffects
from parallel.shards import local
from tests.parallel.test_recipes import BATCH, PLANS, hybrid
from tests.parity import BALANCE, assert_close, counted, follow, logical
from train.execute import Executor
from train.loss import sums
from train.metrics import step_totals

pytestmark = pytest.mark.dist

STEPS, RATE = 3, 0.5
Found = tuple[float, dict[str, np.ndarray]]


def targets() -> int:
    return sum(int((s.targets != -100).sum()) for s in BATCH)


def alone() -> Found:
    """Loss and gradients of the last step, and the magnitudes behind it."""
    model = hybrid()
    follow(model, "fp8_delayed")
    model = initialise(model.double(), seed=1)
    model.compute = torch.float64
    for _ in range(STEPS):
        total = 0.0
        model.zero_grad()
        for s in BATCH:
            tokens, targeted, positions = (torch.from_numpy(x)[None] for x in (s.tokens, s.targets, s.positions))
            part = sums(model(tokens, Whole.of(positions)), targeted)
            loss = part.objective(targets=targets(), tokens=counted(BATCH), balance_weight=BALANCE)
            loss.backward()
            total += loss.item()
        delayed_scaling.settle(model, delayed_scaling.present(model))
        stepped(model)
    return total, {n: p.grad.numpy() for n, p in model.named_parameters()} | pasts(model)


@torch.no_grad()
def stepped(model: LM) -> None:
    for p in model.parameters():
        local(p).sub_(RATE * local(p.grad))


def pasts(model: LM) -> dict[str, np.ndarray]:
    return {name: history.past[:, :STEPS].numpy() for name, history in delayed_scaling.histories(model).items()}


def spread(plan: Plan, mesh: Mesh | None) -> Found:
    groups, device = Groups(mesh), torch.device("cpu")
    with torch.device("meta"):
        model = hybrid()
    model.compute = torch.float64
    low = follow(model, "fp8_delayed")
    options = {"remat": "none", "reshard_after_forward": True}
    parallelise(model, Meshes(groups.mesh, device), seed=1, dtype=torch.float64, **options)
    executor = Executor(model, groups, device, GatherEffects(), GatherKeys(), BALANCE, low=low)
    for _ in range(STEPS):
        model.zero_grad()
        tally = executor.train(plan, BATCH)
        seen = delayed_scaling.present(model)
        total = step_totals.totals(tally, torch.tensor(False), False, 0.0, device, groups, magnitudes=seen)
        delayed_scaling.settle(model, total.magnitudes)
        stepped(model)
    gradients = logical(model, {parameter_name(n): p.grad for n, p in model.named_parameters()})
    loss = total.cross_entropy / targets() + BALANCE * total.balance / counted(BATCH)
    return loss, {name: gradient.numpy() for name, gradient in gradients.items()} | pasts(model)


def on_two_ranks() -> dict[str, Found]:
    found = {name: spread(plan, None) for name, plan in PLANS.items()}
    with patch.object(delayed_scaling, "settle", lambda model, _: own(model)):  # a rank's magnitudes alone
        found["broken"] = spread(PLANS["sequence"], None)
    return found


def own(model: LM) -> None:
    for history in delayed_scaling.histories(model).values():
        history.settle(history.present)


def test_loss_gradients_and_magnitudes_equal_one_process(run):
    want = alone()
    for got in run(2, on_two_ranks):
        for name in PLANS:
            assert_close(got[name], want, "fp64")
        with pytest.raises(AssertionError):
            assert_close(got["broken"], want, "fp64")
