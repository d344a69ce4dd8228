"""Averages of the weights against plain loops over whole ones, on every layout; what is evaluated, saved and taken."""

import math
from pathlib import Path

import numpy as np
import pytest

from parallel.matrix_owners import wholes
from parallel.parallelize import parameter_name
from tests.jobs import order
from train.build import build
from train.checkpoints import checkpoint
from train.checkpoints.hook import Checkpoints
from train.evaluation.heldout import Evaluation, Heldout, heldout
from train.inference.decode import Decoder
from train.optim.average import Average

STEPS, BATCH = 7, 384
LAYOUTS = {1: ["cluster.workers=1"], 2: ["cluster.workers=2"], 3: ["cluster.workers=3", "parallel.data=3"]}
KINDS = {
    "ema": ["model.layers=1", "train.average=ema", "train.average_tokens=1000"],
    "last": ["model.layers=1", "train.average=last", f"train.average_tokens={BATCH * 3 // 2}", "train.average_count=3"],
}
Weights = dict[str, np.ndarray]


def whole(weights) -> Weights:
    return {name: x.numpy().copy() for name, x in wholes(weights).items()}


def raw(trainer) -> Weights:
    return whole({parameter_name(n): p.detach() for n, p in trainer.model.named_parameters()})


def held_out(trainer) -> Heldout:
    own = trainer.hooks.of(Evaluation)
    return heldout(own.executor, own.batches, own.plan)


def steps(job, count: int) -> tuple[list[Weights], Weights]:
    """The weights after each step, and their average at the end."""
    trainer = build(job)
    found = []
    for _ in range(count):
        trainer.advance()
        found.append(raw(trainer))
    return found, whole(trainer.hooks.of(Average).averaged())


def by_hand(kind: str, after: list[Weights]) -> Weights:
    """Over the weights after each step."""
    if kind == "ema":
        mean = after[0]
        for step, weights in enumerate(after[1:], start=2):
            part = max(1 - math.exp(-BATCH / 1000), 1 / step)
            mean = {n: (1 - part) * mean[n] + part * w for n, w in weights.items()}
        return mean
    # Every 576 tokens: after steps 2, 3, 5 and 6 of 384; the last three of these.
    chosen = [after[i - 1] for i in (3, 5, 6)]
    return {n: sum(each[n] for each in chosen) / 3 for n in after[0]}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "world"),
    [pytest.param("ema", 1, marks=pytest.mark.slow), ("ema", 3), pytest.param("last", 2, marks=pytest.mark.slow)],
)
def test_the_average_is_that_of_whole_weights(run, tmp_path, kind, world):
    job = order(tmp_path, tmp_path / "run", *LAYOUTS[world], *KINDS[kind], "precision=fp64", "train.steps=20")
    for after, got in run(world, steps, job, STEPS):
        want = by_hand(kind, after)
        assert got.keys() == want.keys()
        for name, b in want.items():
            assert np.linalg.norm(got[name] - b) <= 1e-12 * np.linalg.norm(b), name
            assert not np.array_equal(got[name], after[-1][name]), f"{name} is no average"


def saved(job, count: int, evaluate: bool) -> tuple[Weights, Weights, Weights, dict[str, float]]:
    """Raw weights before and after an evaluation of the averaged ones, their average, and what it said; saved."""
    trainer = build(job)
    for _ in range(count):
        trainer.advance()
    before = raw(trainer)
    scores = {}
    if evaluate:  # as the loop does: FSDP holds whole weights after the first
        scores["raw"] = held_out(trainer).overall.loss
        scores |= trainer.hooks.of(Evaluation).averaged()
        assert held_out(trainer).overall.loss == scores["raw"]
    trainer.hooks.of(Checkpoints).save()
    return before, raw(trainer), whole(trainer.hooks.of(Average).averaged()), scores


def continued(job, count: int) -> tuple[Weights, Weights]:
    trainer = build(job)
    for _ in range(count):
        trainer.advance()
    return raw(trainer), whole(trainer.hooks.of(Average).averaged())


def initial(job) -> tuple[Weights, float]:
    """The first weights of a run, and their held-out loss."""
    trainer = build(job)
    return raw(trainer), held_out(trainer).overall.loss


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["ema", pytest.param("last", marks=pytest.mark.slow)])
def test_saved_resumed_evaluated_and_taken(run, tmp_path, kind):
    more = [*LAYOUTS[2], *KINDS[kind], "train.steps=20"]
    job = order(tmp_path, tmp_path / "run", *more)
    before, after, average, scores = run(2, saved, job, 5, True)[0]
    assert all(np.array_equal(before[name], after[name]) for name in before), "evaluating has changed the weights"
    path = tmp_path / "run/checkpoints/step-5"

    further = order(tmp_path, tmp_path / "further", *more, resume=str(path))
    straight = run(2, continued, order(tmp_path, tmp_path / "straight", *more), 9)[0]
    for got, want in zip(run(2, continued, further, 4)[0], straight, strict=True):
        assert all(np.array_equal(got[name], want[name]) for name in want), (
            "evaluated, saved and resumed, the same bits"
        )

    taken = ["model.layers=1", "cluster.workers=3", "train.steps=20", "train.init_weights=average"]
    first, loss = run(3, initial, order(tmp_path, tmp_path / "taken", *taken, init_from=str(path)))[0]
    assert all(np.array_equal(first[name], average[name]) for name in average)
    assert loss == pytest.approx(scores["heldout_loss_average"], rel=1e-5) and abs(loss - scores["raw"]) > 1e-4

    decoder = Decoder.load(job["config"].model.values, path, average=True)
    assert all(np.array_equal(p.detach().numpy(), average[n]) for n, p in decoder.model.named_parameters())
    plain = Decoder.load(job["config"].model.values, path)
    assert all(np.array_equal(p.detach().numpy(), before[n]) for n, p in plain.model.named_parameters())


@pytest.mark.slow
@pytest.mark.dist
def test_an_average_of_another_kind_begins_anew(run, tmp_path):
    job = order(tmp_path, tmp_path / "run", *LAYOUTS[2], *KINDS["last"], "train.steps=20")
    run(2, saved, job, 5, False)
    path = tmp_path / "run/checkpoints/step-5"
    assert checkpoint.manifest(path)["average"] == {"kind": "last", "seen": 5 * BATCH, "taken": 3, "snapshots": 3}
    for change in (KINDS["ema"], [*KINDS["last"], "train.average_count=2"]):
        folder = tmp_path / change[0].replace("=", "-")
        other = order(tmp_path, folder, *LAYOUTS[2], *change, "train.steps=20", resume=str(path))
        weights, average = run(2, continued, other, 1)[0]
        assert change != KINDS["ema"] or all(np.array_equal(weights[name], average[name]) for name in weights)
        assert "begins at step 5" in Path(folder / "log.txt").read_text()
