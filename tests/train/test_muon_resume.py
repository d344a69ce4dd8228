"""Muon's state goes through checkpoints: the same bits on the same ranks, the same losses on others."""

import numpy as np
import pytest
import torch

from parallel.matrix_owners import wholes
from tests.jobs import order
from train.build import build
from train.checkpoints.hook import Checkpoints

BEFORE, AFTER = 2, 2
LAYOUTS = {1: ["cluster.workers=1"], 2: ["cluster.workers=2"], 3: ["cluster.workers=3", "parallel.data=3"]}
MORE = ["optimizer=muon", "precision=fp64", "train.steps=20"]


def state(trainer) -> dict[str, list[np.ndarray]]:
    """Every weight and what the optimizer knows of it, whole."""
    tensors = {}
    for name, p in trainer.model.named_parameters():
        parts = trainer.optimizer.state[p]
        kept = [parts[key] for key in ("momentum_buffer", "exp_avg", "exp_avg_sq") if key in parts]
        tensors |= {(name, i): x.detach() for i, x in enumerate((p, *kept))}
    found: dict[str, list[np.ndarray]] = {}
    for (name, _), x in wholes(tensors).items():
        found.setdefault(name, []).append((x.float() if x.dtype == torch.bfloat16 else x).numpy().copy())
    return found


def save_then_go_on(job):
    trainer = build(job)
    for _ in range(BEFORE):
        trainer.step()
    trainer.hooks.of(Checkpoints).save()
    return state(trainer), [trainer.step()[0]["loss"] for _ in range(AFTER)], state(trainer)


def load_then_go_on(job):
    trainer = build(job)
    settings = [(g["weight_decay"], g.get("muon")) for g in trainer.optimizer.param_groups]
    return state(trainer), [trainer.step()[0]["loss"] for _ in range(AFTER)], state(trainer), settings


def same(a: dict[str, list[np.ndarray]], b: dict[str, list[np.ndarray]]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


@pytest.fixture(scope="module")
def before(run, tmp_path_factory):
    """A run's folder, and what `save_then_go_on` gives of it."""
    place = tmp_path_factory.mktemp("before")
    return place / "run", run(2, save_then_go_on, order(place, place / "run", *LAYOUTS[2], *MORE))[0]


@pytest.mark.dist
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(run, before, tmp_path):
    folder, (saved, losses, end) = before
    assert {len(parts) for parts in saved.values()} == {2, 3}, "momentum of matrices, two moments of the rest"
    path = str(folder / "checkpoints" / f"step-{BEFORE}")
    for world, layout in LAYOUTS.items():
        job = order(tmp_path, tmp_path / f"world-{world}", *layout, *MORE, resume=path)
        loaded, again, after, _ = run(world, load_then_go_on, job)[0]
        assert same(loaded, saved), world
        np.testing.assert_allclose(again, losses, rtol=1e-9)
        assert world != 2 or again == losses and same(after, end)


@pytest.mark.dist
def test_a_resumed_run_has_the_settings_that_it_is_given(run, before, tmp_path):
    """Those of the checkpoint, where groups are other ones, neither come back nor stand in the way."""
    path = str(before[0] / "checkpoints" / f"step-{BEFORE}")
    more = [*MORE, "optimizer.weight_decay=0.3", "optimizer.no_decay=[expert]"]
    job = order(tmp_path, tmp_path / "further", *LAYOUTS[2], *more, resume=path)
    settings = run(2, load_then_go_on, job)[0][3]
    assert set(settings) == {(0.3, True), (0.0, True), (0.3, False), (0.0, False)}
