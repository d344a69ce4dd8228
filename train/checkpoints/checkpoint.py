"""Checkpoints: complete or absent.

A checkpoint is written aside (`step-N.partial`), its manifest last, and renamed to `step-N` when every byte is on disk.
The manifest lists each file with its size and CRC-32, so a truncated or altered one is detected and the one before it
is used. Tensors are saved by torch's distributed checkpoint: any world size loads what any other has saved.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from data import reading
from parallel.collectives import Comm
from parallel.parallelize import parameter_name
from parallel.tensor import Division, division_of
from train.checkpoints import stored
from train.checkpoints.disk import DiskError, no_room
from train.checkpoints.hf_reader import Published, PublishedReader, is_folder
from train.checkpoints.pieces import logical
from train.checkpoints.stored import METADATA, DamagedError
from train.checkpoints.stored import CheckpointReader as _Reader
from train.engines.engine import EngineOptimizer
from train.facts import wrong

MANIFEST, FORMAT = "manifest.json", 1
ASIDE = ".aside"  # behind the name of a checkpoint that a run has turned away from: nothing reads it


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    facts: dict[str, Any],
    *,
    keep: int,
    companions: Sequence[Path] = (),
    parts: dict[str, Any] | None = None,
    pipeline: Comm | None = None,
) -> Path:
    """Writes `folder/step-N` from every rank and keeps the newest `keep`. Returns its path. Collective.

    companions: files that travel with it, so that it is of use without its run: configuration, tokenizer, corpus card.
    parts: tensors beside those of the model and the optimizer, by name. pipeline: the ranks that have other layers.
    """
    final = folder / f"step-{facts['step']}"
    aside = final.with_suffix(".partial")
    first = dist.get_rank() == 0
    try:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            for companion in companions:
                shutil.copyfile(companion, aside / companion.name)
        dist.barrier()
        files = _write_tensors(aside, model, optimizer, parts or {}, [companion.name for companion in companions])
        tensors = _tensors(model, pipeline)
        if first:
            manifest = {"format": FORMAT, **facts, "model": tensors, "files": files}
            _write(aside / MANIFEST, json.dumps(manifest, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            _sync_folder(folder)
            prune(folder, facts["step"], keep=keep)
    except BaseException as error:  # CheckpointException is no Exception
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        if (full := no_room(error)) is None:
            raise
        raise DiskError(f"{final.name} cannot be saved in {folder}: {full}") from error
    dist.barrier()
    return final


def _tensors(model: nn.Module, pipeline: Comm | None) -> dict[str, Any]:
    """Returns the shape and the dtype of every parameter, those of other stages included. Collective."""
    whole = division_of(model)
    shapes = {} if whole is None else {name: piece.shape for name, piece in whole.pieces.items()}
    own = {
        (name := parameter_name(n)): [
            list(shapes.get(name, getattr(p, "ds_shape", p.shape))),  # that of a parameter which DeepSpeed has cut
            str(p.dtype).removeprefix("torch."),
        ]
        for n, p in model.named_parameters()
    }
    if pipeline is None:
        return own
    ranks: list[dict[str, Any]] = [{} for _ in pipeline.ranks]
    dist.all_gather_object(ranks, own, group=pipeline.group)
    return {name: tensor for rank in ranks for name, tensor in rank.items()}


def _write_tensors(
    aside: Path, model: nn.Module, optimizer: Optimizer, parts: dict[str, Any], names: list[str]
) -> dict[str, Any]:
    """Writes this rank's part, and returns what the manifest says of all ranks' files. Collective.

    Raises on every rank what any of them has met.
    """
    if isinstance(optimizer, EngineOptimizer):
        state = optimizer.named_state()
    else:
        weights, moments = get_state_dict(model, optimizer)  # settings, no tensors, are the run's own: never read again
        state = {"model": weights, "optimizer": {"state": moments["state"]}}
    planner = stored.TensorSavePlanner(division_of(model))
    dcp.save({**state, **parts}, checkpoint_id=str(aside), planner=planner)
    rank = dist.get_rank()
    own = {METADATA, *names} if rank == 0 else set()
    mine = [p for p in aside.iterdir() if p.name.startswith(f"__{rank}_") or p.name in own]
    sums: list[Any] = [None] * dist.get_world_size()
    try:
        checksums: Any = {p.name: _checksum(p, sync=True) for p in mine}
    except OSError as error:  # a disk may tell only now that it is full
        checksums = error
    dist.all_gather_object(sums, checksums)
    if failed := [part for part in sums if isinstance(part, OSError)]:
        raise failed[0]
    return {name: value for part in sums for name, value in part.items()}


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of a checkpoint whose files are all there, written by one process."""
    files = {p.name: _checksum(p, sync=True) for p in sorted(checkpoint.iterdir())}
    _write(checkpoint / MANIFEST, json.dumps({"format": FORMAT, **facts, "files": files}, indent=1))


def prune(folder: Path, step: int, *, keep: int) -> None:
    """Keeps the newest `keep` checkpoints up to `step`, which has just been written.

    A later one is of an attempt that was passed over as damaged: it must not push a good one out. Half-written ones go.
    """
    checkpoints = complete(folder)
    latest = [p for p in checkpoints if step_of(p) <= step][-keep:]
    for old in (*(p for p in checkpoints if p not in latest), *folder.glob("step-*.partial")):
        shutil.rmtree(old, ignore_errors=True)


def load(checkpoint: Path, model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """Fills the model, and the optimizer unless None (`init_from`), in place; returns the manifest. Collective.

    A new run may remember more than the one it starts from, the bias of a router: such buffers keep their first value.
    """
    if optimizer is None:
        saved = _reader(checkpoint).read_metadata().state_dict_metadata
        buffers = (parameter_name(name) for name, _ in model.named_buffers())
        new = {name for name in buffers if f"model.{name}" not in saved}
        weights = {name: value for name, value in get_model_state_dict(model).items() if name not in new}
        read({"model": weights}, checkpoint, division=division_of(model))
        set_model_state_dict(model, weights, options=StateDictOptions(strict=not new))
    elif isinstance(optimizer, EngineOptimizer):
        read(optimizer.named_state(), checkpoint)
        optimizer.filled()
    else:
        weights, moments = get_state_dict(model, optimizer)
        state = {"state": moments["state"]}  # and not its settings: a resumed run may have been given others
        read({"model": weights, "optimizer": state}, checkpoint, division=division_of(model))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return manifest(checkpoint)


def load_weights(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """`load` without the optimizer's state, into a model that it steps. Collective."""
    if not isinstance(optimizer, EngineOptimizer):
        return load(checkpoint, model, None)
    saved = _reader(checkpoint).read_metadata().state_dict_metadata
    buffers = {parameter_name(name) for name, _ in model.named_buffers()}
    weights = optimizer.named_state()["model"]
    new = {name for name in buffers if f"model.{name}" not in saved}
    read({"model": {name: value for name, value in weights.items() if name not in new}}, checkpoint)
    optimizer.filled()
    return manifest(checkpoint)


def load_moments(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Fills the optimizer's state, and not its settings: this run has its own. Collective."""
    if isinstance(optimizer, EngineOptimizer):
        read({"optimizer": optimizer.named_state()["optimizer"]}, checkpoint)
        optimizer.filled()
        return
    moments = get_optimizer_state_dict(model, optimizer)
    read({"optimizer": {"state": moments["state"]}}, checkpoint, division=division_of(model))
    set_optimizer_state_dict(model, optimizer, moments)


def has_moments(checkpoint: Path) -> bool:
    """Says whether a checkpoint holds an optimizer's state; a folder of Hugging Face's has none. Raises
    DamagedError."""
    if is_folder(checkpoint) or not (checkpoint / METADATA).exists():
        return False
    saved = stored.metadata(checkpoint).state_dict_metadata
    return any(name.startswith("optimizer.state.") for name in saved)


def load_average(checkpoint: Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Fills the model's parameters from the averaged weights; what it remembers besides stays. Collective."""
    averaged = {parameter_name(name): p.detach() for name, p in model.named_parameters()}
    if isinstance(optimizer, EngineOptimizer):
        averaged = {name: value for name, value in optimizer.named_state()["model"].items() if name in averaged}
    read({"average": {"mean": averaged}}, checkpoint, division=division_of(model))
    if isinstance(optimizer, EngineOptimizer):
        optimizer.filled()


def read(state: dict[str, Any], checkpoint: Path, *, alone: bool = False, division: Division | None = None) -> None:
    """Fills a state dict of tensors in place from a checkpoint's files; `alone`: without a process group. division: of
    the model that they belong to.

    Raises DamagedError for a checkpoint that lacks one of them or has it in another shape, before any is filled.
    """
    reader = _reader(checkpoint)
    _check_saved(state, reader.read_metadata(), division)
    try:
        dcp.load(state, storage_reader=reader, planner=stored.TensorLoadPlanner(division), no_dist=alone)
    except CheckpointException as error:
        causes = [each for each, _ in error.failures.values() if isinstance(each, DamagedError | ValueError)]
        raise causes[0] if causes else error from None


def _check_saved(state: dict[str, Any], saved: Metadata, division: Division | None) -> None:
    for name, value in logical(*flatten_state_dict(state), division).items():
        entry = saved.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise DamagedError(f"it has no tensor {name}")
        if tuple(entry.size) != tuple(value.shape):
            raise DamagedError(f"its {name} is {list(entry.size)}, must be {list(value.shape)}")


def _reader(checkpoint: Path) -> dcp.StorageReader:
    """The manifest of a checkpoint of ours, or of a folder of Hugging Face's."""
    return PublishedReader(checkpoint) if is_folder(checkpoint) else _Reader(str(checkpoint))


def complete(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first."""
    return [p for p in _named(folder) if (p / MANIFEST).exists()]


def damaged(folder: Path) -> dict[Path, str]:
    """Why each checkpoint that cannot be used cannot, oldest first; one that was never completed is none."""
    problems = {}
    for checkpoint in _named(folder):
        try:
            verify(checkpoint)
        except DamagedError as error:
            problems[checkpoint] = str(error)
    return problems


def set_aside(checkpoint: Path) -> Path:
    """Takes a checkpoint out of its run, under a name that nothing reads. Returns its new place."""
    to = checkpoint.with_name(checkpoint.name + ASIDE)
    number = 1
    while to.exists():
        number += 1
        to = checkpoint.with_name(f"{checkpoint.name}{ASIDE}-{number}")
    checkpoint.rename(to)
    return to


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, by its place; None where it lies elsewhere."""
    place = checkpoint.absolute()
    inside = place.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", place.name)
    return checkpoint.parent.parent if inside else None


def _named(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{1,18}", p.name)), key=step_of)


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every byte is there; says why a newer one was passed over. None if there is none."""
    for partial in sorted(folder.glob("step-*.partial")):
        say(f"{partial.name.removesuffix('.partial')} was never completed: ignored")
    for checkpoint in reversed(complete(folder)):
        try:
            verify(checkpoint)
            return checkpoint
        except DamagedError as error:
            say(f"checkpoint {checkpoint.name} is damaged ({error}): using the one before it")
    return None


def manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises DamagedError; ValueError for a bad folder of Hugging Face's."""
    if is_folder(checkpoint):
        return Published(checkpoint).manifest()
    try:
        manifest_read = reading.json_object(checkpoint / MANIFEST)
    except ValueError as error:
        raise DamagedError(f"its manifest cannot be read: {error}") from None
    if manifest_read.get("format") != FORMAT:
        raise DamagedError(f"its format is {str(manifest_read.get('format'))[:80]}, this version reads {FORMAT}")
    if (key := wrong(manifest_read)) is not None:
        raise DamagedError(f"its manifest says of {key} what cannot be")
    return manifest_read


def verify(checkpoint: Path) -> None:
    """Raises DamagedError naming the first file that is missing, cut or altered, or is no part of a checkpoint;
    ValueError for a bad folder of Hugging Face's."""
    facts = manifest(checkpoint)
    if is_folder(checkpoint):
        return
    if not facts["files"]:
        raise DamagedError("its manifest lists no files")
    for name, (size, crc) in facts["files"].items():
        try:
            bytes_stored = stored.size_in(checkpoint, name)
        except ValueError as error:
            missing = not set(name) & set("/\\\0") and not (checkpoint / name).exists()
            raise DamagedError(f"{name} is missing" if missing else f"its manifest {error}") from None
        if bytes_stored != size:
            raise DamagedError(f"{name} has {bytes_stored:,} of {size:,} bytes")
        if _checksum(checkpoint / name)[1] != crc:
            raise DamagedError(f"{name} has been altered")
    if METADATA in facts["files"]:
        _check_pieces(facts, stored.metadata(checkpoint))


def _check_pieces(facts: dict[str, Any], saved: Metadata) -> None:
    """Holds where tensors lie against what the manifest lists. Raises DamagedError."""
    for piece in (saved.storage_data or {}).values():
        if piece.relative_path not in facts["files"]:
            raise DamagedError(f"its manifest does not list {piece.relative_path}")
    for name, (shape, _) in facts["model"].items():
        entry = saved.state_dict_metadata.get(f"model.{name}")
        if not isinstance(entry, TensorStorageMetadata):
            raise DamagedError(f"it has no tensor model.{name}")
        if list(entry.size) != shape:
            raise DamagedError(f"its manifest says {name} is {shape}, its .metadata {list(entry.size)}")


def first_difference(checkpoint: Path, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The first tensor of a model that a checkpoint lacks or has in another shape, as a phrase; None if all agree."""
    saved = {name: tuple(shape) for name, (shape, _) in manifest(checkpoint)["model"].items()}
    for name, shape in shapes.items():
        if name not in saved:
            return f"{name} {list(shape)} is not in the checkpoint"
        if saved[name] != shape:
            return f"{name} is {list(saved[name])} in the checkpoint, {list(shape)} in this model"
    extra = next((name for name in saved if name not in shapes), None)
    return None if extra is None else f"{extra} {list(saved[extra])} is not in this model"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def _checksum(path: Path, *, sync: bool = False) -> tuple[int, int]:
    """(bytes, CRC-32) of a file; with `sync`, after it has reached the disk."""
    crc, size = 0, 0
    with path.open("rb+") if sync else reading.opened(path) as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
