"""Runs whose experts lie on several ranks: the same losses, the same checkpoints, and all that a run does besides."""

import numpy as np
import pytest

from parallel.matrix_owners import wholes
from tests.jobs import order
from train.build import build
from train.checkpoints.hook import Checkpoints

pytestmark = pytest.mark.dist

BEFORE, AFTER = 2, 2
EXPERTS, SEQUENCE = ["parallel.expert=2", "parallel.sequence=1"], ["parallel.sequence=2"]
MORE = [
    "precision=fp64",
    "model.layers=1",
    "train.steps=60",
    "train.average=ema",
    "train.clip=0.5",
    "model.blocks.gla.ffn.bias_rate=0.1",
]


def state(trainer) -> dict[str, list[np.ndarray]]:
    """Every parameter and what is remembered of it, whole."""
    kept = trainer.optimizer.state
    found = {n: [p, *(x for x in kept[p].values() if x.dim())] for n, p in trainer.model.named_parameters()}
    from train.optim.average import Average

    found |= {f"average {n}": [x] for n, x in trainer.hooks.of(Average).averaged().items()}
    found |= {n: [b] for n, b in trainer.model.named_buffers()}
    every = wholes({(n, i): x.detach() for n, several in found.items() for i, x in enumerate(several)})
    return {n: [every[n, i].numpy().copy() for i in range(len(several))] for n, several in found.items()}


def saved(job) -> tuple[dict, list[float]]:
    """The state at a checkpoint, and the losses before and after it."""
    trainer = build(job)
    losses = [trainer.step()[0]["loss"] for _ in range(BEFORE)]
    trainer.hooks.of(Checkpoints).save()
    return state(trainer), losses + [trainer.step()[0]["loss"] for _ in range(AFTER)]


def loaded(job) -> tuple[dict, list[float]]:
    trainer = build(job)
    return state(trainer), [trainer.step()[0]["loss"] for _ in range(AFTER)]


def both_ways(first, behind, back):
    """A run with experts over ranks, its checkpoint without them, and with them the checkpoint of one process."""
    return saved(first), loaded(behind), loaded(back)


def same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, tensors in want.items():
        assert len(tensors) == len(got[name]) > 0
        for a, b in zip(got[name], tensors, strict=True):
            assert np.array_equal(a, b), name


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_run_and_its_checkpoints_are_those_of_one_process(run, tmp_path, optimizer):
    def job(name, *more, **rest):
        return order(tmp_path, tmp_path / name, *more, *MORE, f"optimizer={optimizer}", **rest)

    def at(name):
        return str(tmp_path / name / "checkpoints" / f"step-{BEFORE}")

    ((kept, want),) = run(1, saved, job("alone", "cluster.workers=1"))
    jobs = [
        job("experts", "cluster.workers=2", *EXPERTS),
        job("experts then sequence", "cluster.workers=2", *SEQUENCE, resume=at("experts")),
        job("alone then experts", "cluster.workers=2", *EXPERTS, resume=at("alone")),
    ]
    for (state, losses), behind, back in run(2, both_ways, *jobs):
        np.testing.assert_allclose(losses, want, rtol=1e-9)
        for before, (after, more) in ((state, behind), (kept, back)):
            same(after, before)
            np.testing.assert_allclose(more, want[BEFORE:], rtol=1e-9)


def losses(*jobs) -> list[list[float]]:
    trainers = [build(job) for job in jobs]
    return [[trainer.step()[0]["loss"] for _ in range(AFTER)] for trainer in trainers]


SETTINGS = {
    "spans in time": ["train.span_tokens=20"],
    "in micro-steps, selectively recomputed": ["engine.recompute=selective", "scheduler.tokens_per_rank=100"],
}
LIMITED = ["model.blocks.gla.ffn.capacity_factor=0.9", "train.span_tokens=40"]


@pytest.mark.slow
def test_losses_with_other_settings_and_ways_of_rows(run, tmp_path):
    def job(name, *more):
        return order(tmp_path, tmp_path / name, *more, *MORE)

    ((want,),) = run(1, losses, job("alone", "cluster.workers=1"))
    limited = [[*EXPERTS, "parallel.transport.experts=padded"], EXPERTS, ["parallel.data=2"]]
    jobs = [job(name, "cluster.workers=2", *EXPERTS, *more) for name, more in SETTINGS.items()]
    jobs += [job(f"limited {i}", "cluster.workers=2", *each, *LIMITED) for i, each in enumerate(limited)]
    for *several, padded, counted, here in run(2, losses, *jobs):
        for each in several:
            np.testing.assert_allclose(each, want, rtol=1e-9)
        np.testing.assert_allclose(padded, counted, rtol=1e-12)
        np.testing.assert_allclose(here, counted, rtol=1e-9)
        assert abs(counted[0] - want[0]) > 1e-6, "choices should be dropped"
