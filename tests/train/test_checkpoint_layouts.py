"""A checkpoint on its way through layouts of every axis, at 1, 2, 4 and 8 ranks: always the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.schedule.mesh import Mesh
from tests.jobs import order
from tests.train.test_pipeline_run import tensors
from train.build import build
from train.checkpoints import checkpoint
from train.checkpoints.hook import Checkpoints

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 2
LAYOUTS = (
    Mesh(pipeline=2, expert=2, sequence=2),
    Mesh(),
    Mesh(tensor=2, sequence=2),
    Mesh(replicate=2, data=2, tensor=2),
    Mesh(expert=2),
    Mesh(data=2, expert=2, tensor=2),
    Mesh(pipeline=2, data=2),
    Mesh(replicate=2, pipeline=2, expert=2),
    Mesh(tensor=2),
    Mesh(expert=2, sequence=2, tensor=2),
    Mesh(replicate=2, expert=2),
    Mesh(pipeline=4, sequence=2),
    Mesh(sequence=2),
    Mesh(data=2, sequence=4),
    Mesh(),
)


def saved(job: dict[str, Any], steps: int) -> float:
    """Saves a checkpoint after so many steps. Returns the loss of the next one."""
    trainer = build(job)
    for _ in range(steps):
        trainer.step()
    trainer.hooks.of(Checkpoints).save()
    return trainer.step()[0]["loss"]


def overrides(mesh: Mesh) -> list[str]:
    sizes = [f"parallel.{name}={size}" for name, size in mesh.sizes.items()]
    more = ["train.batch_tokens=768", f"scheduler.tokens_per_rank={96 // mesh.sequence}"]  # for stages: 8 sequences
    return ["model.layers=4", "model.pattern=[gla,gdn,gla,attn]", f"cluster.workers={mesh.world}", *more, *sizes]


def test_the_bits_of_a_checkpoint_are_the_same_behind_every_layout(run, tmp_path: Path):
    """Each layout loads what the one before has saved, and saves it: every parameter, and AdamW's two moments."""
    assert {mesh.world for mesh in LAYOUTS} == {1, 2, 4, 8}
    assert all(max(mesh.sizes[axis] for mesh in LAYOUTS) > 1 for axis in Mesh().sizes)
    before, want, losses = None, dict[str, torch.Tensor](), set[float]()
    for i, mesh in enumerate(LAYOUTS):
        folder = tmp_path / f"{i}"
        job = order(tmp_path, folder, "precision=fp64", *overrides(mesh), **({"resume": before} if before else {}))
        losses |= set(run(mesh.world, saved, job, 0 if before else STEPS))
        path = folder / "checkpoints" / f"step-{STEPS}"
        checkpoint.verify(path)
        found, before = tensors(path), str(path)
        want = want or found
        assert found.keys() == want.keys() and any("exp_avg_sq" in name for name in found)
        for name, value in want.items():
            assert torch.equal(found[name], value), f"{name}, behind {mesh}"
    np.testing.assert_allclose(list(losses), min(losses), rtol=1e-9)
