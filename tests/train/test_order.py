"""Lengths that change from step to step, in training: the same on every layout and after a resume, bitwise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.positions import RoPE
from tests.jobs import order
from train.build import build
from train.checkpoints.hook import Checkpoints

pytestmark = pytest.mark.dist

GROWING = [
    "precision=fp64",
    "train.steps=20",
    "data.packing=decomposition",
    "data.max_length=64",
    "data.min_length=16",
    "curriculum=grow_p2",
    "curriculum.cycles=2",
    "curriculum.tokens=1536",
    "curriculum.context=[[0,32,null],[768,64,20000]]",
]
LAYOUTS = {
    "sequence 2": ["cluster.workers=2"],
    "data 2, accumulated": ["cluster.workers=2", "parallel.data=2", "scheduler.tokens_per_rank=96"],
}
STEPS = 4


def bases(trainer: Any) -> set[float]:
    found = (getattr(module, "positions", None) for module in trainer.model.modules())
    return {positions.base for positions in found if isinstance(positions, RoPE)}


def train(job: dict[str, Any], steps: int, save_at: int | None = None) -> Any:
    """Of each step its loss, its longest sequence and its rotary bases; where it was saved; what was drawn."""
    trainer, found, saved = build(job), [], None
    for step in range(1, steps + 1):
        longest = max(len(s.tokens) for s in trainer.batches.batch(trainer.seed, trainer.state.step))
        record, _ = trainer.step()
        found.append((record["loss"], record["grad_norm"], longest, bases(trainer)))
        assert sum(record["drawn"].values()) == record["tokens"]
        if step == save_at:
            saved = str(trainer.hooks.of(Checkpoints).save())
    return found, saved


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("order")
    return run(1, train, order(folder, folder / "alone", *GROWING, "cluster.workers=1"), STEPS, save_at=STEPS // 2)[0]


def test_lengths_and_rotary_bases_are_those_of_the_curriculum(alone: Any) -> None:
    steps, path = alone
    assert [base for *_, base in steps] == [{10_000.0}] * 2 + [{20_000.0}] * 2
    lengths = [longest for _, _, longest, _ in steps]
    assert max(lengths[:2]) == 32 and max(lengths) == 64 and min(lengths) == 16
    facts = json.loads((Path(path) / "manifest.json").read_text())
    assert facts["rope_theta"] is None and facts["order"]["data.packing"] == "decomposition"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_the_same_on_every_layout(run, alone: Any, tmp_path: Path, layout: str) -> None:
    for found, _ in run(2, train, order(tmp_path, tmp_path / "run", *GROWING, *LAYOUTS[layout]), STEPS):
        np.testing.assert_allclose([row[:2] for row in found], [row[:2] for row in alone[0]], rtol=1e-9)


def test_resuming_is_bitwise_uninterrupted(run, alone: Any, tmp_path: Path) -> None:
    whole, path = alone
    job = order(tmp_path, tmp_path / "rest", *GROWING, "cluster.workers=1", resume=path)
    ((rest, _),) = run(1, train, job, STEPS // 2)
    assert rest == whole[STEPS // 2 :]
