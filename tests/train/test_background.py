"""Checkpoints written beside training: the bits of their moment, one at a time, complete or absent; failures of all.

A gate holds the writing thread back, so that training certainly goes on in between.
"""

import resource
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.jobs import order
from train.build import build
from train.checkpoints import checkpoint, saving
from train.checkpoints.background import StateCopies
from train.checkpoints.disk import DiskError
from train.checkpoints.hook import Checkpoints
from train.checkpoints.pieces import stretch

EVERY = [
    "model.layers=1",
    "train.steps=9",
    "train.checkpoint_every=384",
    "train.keep=9",
    "train.average=ema",
    "cluster.workers=2",
]


class Gated:
    """A trainer whose checkpoints are written when `gate` is set."""

    def __init__(self, job: dict[str, Any]):
        self.gate, original = threading.Event(), saving.write

        def held_back(*given: Any, **more: Any) -> Path:
            assert self.gate.wait(60)
            return original(*given, **more)

        saving.write = held_back
        self.trainer = build(job)
        self.saves, self.folder = self.trainer.hooks.of(Checkpoints), Path(job["run_dir"]) / "checkpoints"
        self.said: list[str] = []
        self.saves.say = self.said.append
        self.moments: dict[int, list[torch.Tensor]] = {}

    def step(self, *, due: bool) -> None:
        progress = self.trainer.progress
        progress.settings = replace(progress.settings, checkpoint_every=384 if due else None)
        self.trainer.advance()
        self.moments[progress.state.step] = self.moment()

    def moment(self) -> list[torch.Tensor]:
        """Weights and moments of this rank, copied."""
        own = []
        for p in self.trainer.model.parameters():
            state = self.trainer.optimizer.state[p]
            own += [x.to_local().detach().clone() for x in (p, state["exp_avg"], state["exp_avg_sq"])]
        return own

    def holds(self, step: int) -> bool:
        """Says whether a checkpoint holds the bits of its step."""
        path = self.folder / f"step-{step}"
        checkpoint.verify(path)
        checkpoint.load(path, self.trainer.model, self.trainer.optimizer)
        return all(torch.equal(a, b) for a, b in zip(self.moment(), self.moments[step], strict=True))

    @property
    def there(self) -> list[str]:
        return sorted(p.name for p in self.folder.glob("step-?"))


def beside(job: dict[str, Any]) -> dict[str, Any]:
    run, found = Gated(job), dict[str, Any]()
    run.step(due=True)
    run.step(due=False)
    found["while"] = run.saves.background.writing, run.there, list(run.said)
    threading.Timer(0.3, run.gate.set).start()
    run.step(due=True)  # waits for the first
    found["after"] = run.there, list(run.said)
    run.saves.settle()
    found["tokens"] = [checkpoint.manifest(run.folder / f"step-{n}")["step"] for n in (1, 3)]
    found["parted"] = any(not torch.equal(a, b) for a, b in zip(run.moments[1], run.moments[2], strict=True))
    found["holds"] = [run.holds(n) for n in (1, 3)]
    run.gate.clear()
    run.step(due=True)
    threading.Timer(0.3, run.gate.set).start()
    run.saves.on_failure(RuntimeError("of this step, not of the checkpoint"))
    found["failed"] = run.there, list(run.said)
    return found | {"full": without_room(run)}


def without_room(run: Gated) -> tuple[Any, ...]:
    """A checkpoint for which rank 1 has no room: at which step each rank hears of it, what it hears, what is left."""
    dist.barrier()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        for _ in range(100):
            run.step(due=not run.saves.background.writing and run.trainer.progress.state.step == 4)
    except DiskError as error:
        return run.trainer.progress.state.step, str(error), sorted(p.name for p in run.folder.iterdir()), run.said[3:]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        dist.barrier()
    return ()


@pytest.mark.dist
def test_a_checkpoint_beside_training_has_the_bits_of_its_moment_and_fails_on_all_ranks(run, tmp_path: Path) -> None:
    first, second = run(2, beside, order(tmp_path, tmp_path / "run", *EVERY, "train.steps=99"))
    for found in (first, second):
        assert found["while"] == (True, [], []), "nothing is told of, and nothing is there, before it is complete"
        assert found["after"] == (["step-1"], ["checkpoint checkpoints/step-1"])
        assert found["parted"] and found["holds"] == [True, True] and found["tokens"] == [1, 3]
        assert found["failed"][0] == ["step-1", "step-3", "step-4"]
        assert found["failed"][1] == [f"checkpoint checkpoints/step-{n}" for n in (1, 3, 4)]
        step, line, left, said = found["full"]
        assert line.startswith("step-5 cannot be saved in ") and "\n" not in line and said == []
        assert left == ["step-1", "step-3", "step-4"]
        assert 5 < step < 99
    assert first["full"][0] == second["full"][0], "both ranks stop at the same step"


def torn(job: dict[str, Any]) -> bool:
    """The same without copies: what is written is then of a later moment."""
    StateCopies.of = lambda self, state: dict(state)  # type: ignore[method-assign]
    run = Gated(job)
    run.step(due=True)
    run.step(due=False)
    run.gate.set()
    run.saves.settle()
    return run.holds(1)


@pytest.mark.slow
@pytest.mark.dist
def test_without_a_copy_a_checkpoint_has_other_bits(run, tmp_path: Path) -> None:
    assert not any(run(2, torn, order(tmp_path, tmp_path / "run", *EVERY, "train.steps=99")))


def test_copies_use_their_memory_again_and_are_of_their_moment() -> None:
    flat = torch.arange(10.0)
    state = {"model": {"a": torch.ones(2, 3), "b": stretch((4, 4), 3, flat)}, "optimizer": {"step": torch.tensor(1.0)}}
    copies = StateCopies()
    first = copies.of(state)
    boxes = {at: box.clone() for at, box in state["model"]["b"].logical.held.items()}
    place = first["model"]["a"].data_ptr()
    state["model"]["a"] += 1
    flat += 1
    assert first["model"]["a"].eq(1).all() and first["optimizer"]["step"] == 1
    held = first["model"]["b"].logical.held
    assert held.keys() == boxes.keys() and all(torch.equal(held[at], boxes[at]) for at in boxes)
    assert copies.of(state)["model"]["a"].data_ptr() == place and first["model"]["a"].eq(2).all()
