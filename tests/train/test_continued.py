"""Runs that go on: inside every phase of every schedule bit for bit, with the optimizer's state or without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from tests.jobs import order
from train.build import build
from train.checkpoints import checkpoint, saving
from train.checkpoints.hook import Checkpoints
from train.optim import carry_over

pytestmark = pytest.mark.dist

STEPS = 8
SAVED = (1, 3, 5, 6)  # after these steps: inside each phase, and at the joint of some
SHORT = ["cluster.workers=1", "train.batch_tokens=96", f"train.steps={STEPS}", "tracking=none", "model.layers=1"]
SCHEDULES = {
    "infinite": ["schedule=infinite", "schedule.warmup=0.2", "schedule.cooldown=0.3", "schedule.anneal=0.25"],
    "wsd, exponential": ["schedule=wsd", "schedule.warmup=0.3", "schedule.decay=0.4", "schedule.tail=exponential"],
    "power, a tail": ["schedule=power", "schedule.warmup=0.2", "schedule.hold=0.2", "schedule.decay=0.3"],
    "phases, a ramp": [
        "schedule=phases",  # the smallest batch, 96, is the length of a sequence
        "schedule.phases=[[0.3,1.0,linear],[0.3,0.5,inverse_sqrt],[0.4,0.1,sqrt]]",
        "train.batch_tokens=[[0,96],[192,192],[500,288]]",
    ],
    "from its midst": ["schedule=rewarm", "schedule.begin=192", "schedule.start=0.4", "schedule.warmup=0.3"],
}
SIMPLE = ("wsd, exponential", "power, a tail", "from its midst")  # the others have as much in them


def steps(trainer: Any, count: int) -> list[tuple]:
    records = [trainer.step()[0] for _ in range(count)]
    return [tuple(r[name] for name in ("step", "tokens", "loss", "grad_norm", "lr")) for r in records]


def whole_and_resumed(job: dict[str, Any]) -> tuple[list, list[list]]:
    """The steps of a run that saves now and then, and one of each of those that are resumed from there."""
    trainer, found, resumed = build(job), [], []
    for n in range(1, STEPS + 1):
        found += steps(trainer, 1)
        if n in SAVED:
            path = trainer.hooks.of(Checkpoints).save()
            resumed.append(steps(build({**job, "run_dir": f"{job['run_dir']}-{n}", "resume": str(path)}), 1))
    return found, resumed


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SIMPLE)) for n in SCHEDULES])
def test_resuming_inside_any_phase_is_bitwise_uninterrupted(run, tmp_path: Path, name: str) -> None:
    job = order(tmp_path, tmp_path / "run", *SHORT, *SCHEDULES[name])
    ((whole, resumed),) = run(1, whole_and_resumed, job)
    assert len({rate for *_, rate in whole}) > 3, "the rate moves"
    for n, found in zip(SAVED, resumed, strict=True):
        assert found == whole[n : n + 1]
    if "ramp" in name:
        sizes = np.diff([0, *(tokens for _, tokens, *_ in whole)]).tolist()
        assert sizes == [96] * 2 + [192] * 2 + [288] * 4


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 1)


def adamw(model: nn.Module, decay: float) -> AdamW:
    first, second = model.first.parameters(), model.second.parameters()  # type: ignore[union-attr]
    return AdamW([{"params": first, "weight_decay": decay}, {"params": second}], weight_decay=0.0, fused=True)


def taken_over(folder: Path) -> tuple[bool, list, dict[str, list]]:
    """Whether a checkpoint has an optimizer's state; that state; and what of it each kind of start has."""

    def state(model: nn.Module, optimizer: AdamW) -> list[tuple]:
        found = (optimizer.state[p] for p in model.parameters())
        return [tuple(s[key].clone().numpy() for key in ("exp_avg", "exp_avg_sq", "step")) for s in found]

    model = Small()
    parent = adamw(model, 0.1)
    for n in range(3):
        model.second(model.first(torch.full((2, 4), n + 1.0)).relu()).sum().backward()
        parent.step()
    path = saving.save(folder, model, parent, {"step": 3}, keep=1)
    found = {}
    for kind in ("keep", "reset_mean", "reset_moments"):
        other = Small()
        child = adamw(other, 0.3)
        carry_over.load(path, other, child, kind)
        assert [group["weight_decay"] for group in child.param_groups] == [0.3, 0.0], "the new run's settings hold"
        found[kind] = state(other, child)
    return checkpoint.has_moments(path), state(model, parent), found


def test_the_optimizers_state_is_kept_or_reset_as_asked(run, tmp_path: Path) -> None:
    ((there, parent, found),) = run(1, taken_over, tmp_path)
    assert there and not checkpoint.has_moments(tmp_path)
    for kind, states in found.items():
        assert len(states) == len(parent) == 4
        for (mean, square, count), was in zip(states, parent, strict=True):
            assert count == was[2] == 3 and was[1].any()
            assert np.array_equal(mean, was[0] if kind == "keep" else 0 * mean)
            assert np.array_equal(square, 0 * square if kind == "reset_moments" else was[1])
