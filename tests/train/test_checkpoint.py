"""Checkpoints: complete or absent, and the same tensors at any world size."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel.matrix_owners import wholes
from tests.jobs import order
from tests.train.test_invariance import PRECISION, TOLERANCE
from train.build import build
from train.checkpoints import checkpoint, saving
from train.checkpoints.disk import checksum
from train.checkpoints.hook import Checkpoints

BEFORE = 2
LAYOUTS = {1: ["cluster.workers=1"], 2: ["cluster.workers=2"], 4: ["cluster.workers=4", "parallel.data=2"]}


def save_then_go_on(job, steps):
    """Parameters at the checkpoint, and the losses of the steps after it."""
    trainer = build(job)
    for _ in range(BEFORE):
        trainer.step()
    trainer.hooks.of(Checkpoints).save()
    return whole(trainer), [trainer.step()[0]["loss"] for _ in range(steps)]


def load_then_go_on(job, steps):
    trainer = build(job)
    return whole(trainer), [trainer.step()[0]["loss"] for _ in range(steps)]


def whole(trainer):
    state = trainer.optimizer.state
    named = dict(trainer.model.named_parameters())
    kinds = [{n: p.detach() for n, p in named.items()}]
    kinds += [{n: state[p][key] for n, p in named.items()} for key in ("exp_avg", "exp_avg_sq")]
    found = [wholes(kind) for kind in kinds]
    return {name: [kind[name].numpy().copy() for kind in found] for name in named}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("precision", "steps"), [("fp64", 2), *(pytest.param(p, 50, marks=pytest.mark.slow) for p in ("fp64", "fp32"))]
)
def test_another_world_size_loads_the_same_bits_and_goes_on_the_same_way(run, tmp_path, precision, steps):
    more = [*PRECISION[precision], "train.steps=60"]
    saved, losses = run(2, save_then_go_on, order(tmp_path, tmp_path / "run", *LAYOUTS[2], *more), steps)[0]
    path = tmp_path / "run" / "checkpoints" / f"step-{BEFORE}"
    checkpoint.verify(path)
    for world, layout in LAYOUTS.items():
        job = order(tmp_path, tmp_path / f"world-{world}", *layout, *more, resume=str(path))
        for loaded, again in run(world, load_then_go_on, job, steps):
            assert loaded.keys() == saved.keys()
            for name, tensors in loaded.items():
                for got, want in zip(tensors, saved[name], strict=True):
                    assert np.array_equal(got, want), (world, name)
            np.testing.assert_allclose(again, losses, rtol=TOLERANCE[precision])
            assert world != 2 or again == losses


def fake(folder: Path, step: int, **change) -> Path:
    """A folder in a checkpoint's format."""
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"x" * 1000)
    facts = {"format": checkpoint.FORMAT, "step": step, "model": {"a": [[2, 3], "float32"], "b": [[4], "float32"]}}
    files = {"__0_0.distcp": list(checksum(path / "__0_0.distcp"))}
    (path / checkpoint.MANIFEST).write_text(json.dumps({**facts, "files": files, **change}))
    return path


def cut(path):
    (path / "__0_0.distcp").write_bytes(b"x" * 999)


def flip(path):
    (path / "__0_0.distcp").write_bytes(b"x" * 500 + b"y" + b"x" * 499)


def remove(path):
    (path / "__0_0.distcp").unlink()


def spoil_manifest(path):
    (path / checkpoint.MANIFEST).write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [(cut, "999 of 1,000 bytes"), (flip, "altered"), (remove, "missing"), (spoil_manifest, "manifest")],
)
def test_damage_is_found_and_the_checkpoint_before_is_used(tmp_path, damage, words):
    older, newer = fake(tmp_path, 9), fake(tmp_path, 10)
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == newer and not said
    damage(newer)
    assert checkpoint.newest(tmp_path, said.append) == older
    assert len(said) == 1 and "step-10" in said[0] and words in said[0]
    damage(older)
    assert checkpoint.newest(tmp_path, said.append) is None


def test_a_checkpoint_from_elsewhere_cannot_run_code(tmp_path):
    path = fake(tmp_path, 1)
    for names in (b"cos\nsystem\n", b"ctorch.distributed.checkpoint.filesystem\nos.system\n"):
        (path / ".metadata").write_bytes(names + b"(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
        with pytest.raises(checkpoint.DamagedError, match="which no checkpoint needs"):
            checkpoint._Reader(str(path)).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_a_damaged_later_checkpoint_does_not_push_a_good_one_out(tmp_path):
    for step in (10, 20, 30, 90):
        fake(tmp_path, step)
    (tmp_path / "step-40.partial").mkdir()
    checkpoint.prune(tmp_path, 30, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-30"]


def test_a_folder_without_a_manifest_is_absent(tmp_path):
    (tmp_path / "step-3.partial").mkdir()
    (tmp_path / "step-4").mkdir()
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) is None
    assert said == ["step-3 was never completed: ignored"]


def test_the_first_tensor_that_differs_is_named(tmp_path):
    path = fake(tmp_path, 1)
    assert checkpoint.first_difference(path, {"a": (2, 3), "b": (4,)}) is None
    assert checkpoint.first_difference(path, {"a": (2, 4), "b": (5,)}) == (
        "a is [2, 3] in the checkpoint, [2, 4] in this model"
    )
    assert checkpoint.first_difference(path, {"a": (2, 3), "c": (1,)}) == "c [1] is not in the checkpoint"
    assert checkpoint.first_difference(path, {"a": (2, 3)}) == "b [4] is not in this model"


def on_a_full_disk(folder: Path, rank_without_room: int, most: int) -> tuple[str, str, list[str]]:
    """How a save ends where one rank's files may not grow beyond `most` bytes, and what it leaves."""
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 200)).sum().backward()
    optimizer.step()
    saving.save(folder, model, optimizer, {"step": 1}, keep=2)
    if dist.get_rank() == rank_without_room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        saving.save(folder, model, optimizer, {"step": 2}, keep=2)
    except Exception as error:
        told = type(error).__name__, str(error)
    else:
        told = "", ""
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    return *told, sorted(p.name for p in folder.iterdir())


@pytest.mark.dist
def test_a_disk_without_room_is_one_line_and_leaves_the_checkpoints_before(run, tmp_path):
    for number, (rank, most) in enumerate([(0, 100_000), (1, 0)]):
        folder = tmp_path / str(number)
        told = run(2, on_a_full_disk, folder, rank, most)
        for kind, line, left in told:
            assert kind == "DiskError", (kind, line)
            assert line.startswith(f"step-2 cannot be saved in {folder}: ") and "\n" not in line
            assert left == ["step-1"]
        checkpoint.verify(folder / "step-1")
