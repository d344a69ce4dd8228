"""Runs whose layers lie on several ranks: the same losses, records and checkpoints as on one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.jobs import order
from train.build import build
from train.checkpoints import checkpoint
from train.checkpoints.hook import Checkpoints

pytestmark = pytest.mark.dist

STEPS = 3
ALONE = ["cluster.workers=1", "scheduler.tokens_per_rank=96"]
TWO = ["cluster.workers=2", "parallel.pipeline=2", "scheduler.tokens_per_rank=96"]
MORE = [
    "precision=fp64",
    "train.steps=6",
    "train.evaluate_every=384",
    "train.average=ema",
    "train.z_weight=0.001",
    "tracking.norms=true",
    "model.tied=true",
    "model.blocks.gla.ffn.balance=batch",
    "model.blocks.gla.ffn.bias_rate=0.01",
]
COMPARED = ("loss", "balance_loss", "z_loss", "grad_norm", "heldout_loss", "heldout_accuracy", "heldout_loss_average")


def trained(job, steps: int):
    """The records of some steps, and a checkpoint after them."""
    trainer = build(job)
    records = [trainer.advance() for _ in range(steps)]
    trainer.hooks.of(Checkpoints).save()
    return records


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, without a process group."""
    reader = dcp.FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def test_losses_records_and_checkpoints_are_those_of_one_process(run, tmp_path):
    """Three steps at pipeline 2, whose checkpoint one process loads and saves again: the same bits, and back; both go
    on the same way."""
    alone = run(1, trained, order(tmp_path, tmp_path / "alone", *ALONE, *MORE), STEPS)[0]
    records = run(2, trained, order(tmp_path, tmp_path / "two", *TWO, *MORE), STEPS)
    for rank in records:
        for got, want in zip(rank, alone, strict=True):
            for key in COMPARED:
                np.testing.assert_allclose(got[key], want[key], rtol=1e-9, err_msg=key)
            for key in ("gradient_norms", "weight_norms", "expert_load"):
                assert got[key].keys() == want[key].keys()
                for layer, value in want[key].items():
                    np.testing.assert_allclose(got[key][layer], value, rtol=1e-9, err_msg=f"{key} {layer}")
    saved = tmp_path / "two" / "checkpoints" / f"step-{STEPS}"
    checkpoint.verify(saved)
    want = tensors(saved)
    assert want.keys() == tensors(tmp_path / "alone" / "checkpoints" / f"step-{STEPS}").keys()
    facts = (checkpoint.manifest(tmp_path / name / "checkpoints" / f"step-{STEPS}") for name in ("two", "alone"))
    assert len({tuple(sorted((n, *s, d) for n, (s, d) in each["model"].items())) for each in facts}) == 1

    again, back = (tmp_path / name for name in ("again", "back"))
    run(1, trained, order(tmp_path, again, *ALONE, *MORE, resume=str(saved)), 0)
    passed_on = again / "checkpoints" / f"step-{STEPS}"
    run(2, trained, order(tmp_path, back, *TWO, *MORE, resume=str(passed_on)), 0)
    for path in (passed_on, back / "checkpoints" / f"step-{STEPS}"):
        found = tensors(path)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], value) for name, value in want.items())
