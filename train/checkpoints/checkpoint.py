"""Checkpoints: complete or absent.

A checkpoint is written aside (`step-N.partial`), its manifest last, and renamed to `step-N` when every byte is on disk.
The manifest lists each file with its size and CRC-32, so a truncated or altered one is detected and the one before it
is used. Tensors are saved by torch's distributed checkpoint: any world size loads what any other has saved.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from models.delayed_scaling import histories
from parallel.parallelize import parameter_name
from parallel.shards import ByParts
from parallel.tensor import Division, division_of
from train.checkpoints import stored
from train.checkpoints.disk import checksum, write_text
from train.checkpoints.hf_reader import Published, PublishedReader, is_folder
from train.checkpoints.pieces import logical
from train.checkpoints.stored import METADATA, DamagedError
from train.checkpoints.stored import CheckpointReader as _Reader
from train.engines.engine import EngineOptimizer
from train.facts import wrong

MANIFEST, FORMAT = "manifest.json", 1
ASIDE = ".aside"  # behind the name of a checkpoint that a run has turned away from: nothing reads it


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of a checkpoint whose files are all there, written by one process."""
    files = {p.name: checksum(p, sync=True) for p in sorted(checkpoint.iterdir())}
    write_text(checkpoint / MANIFEST, json.dumps({"format": FORMAT, **facts, "files": files}, indent=1))


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
    So do magnitudes of delayed scales in a run that goes on, whose recipe may be another than before.
    """
    if optimizer is None:
        reader = _reader(checkpoint)
        new = _new_buffers(model, reader)
        with ByParts():
            weights = {name: value for name, value in get_model_state_dict(model).items() if name not in new}
        _fill({"model": weights}, reader, division=division_of(model))
        with ByParts():
            set_model_state_dict(model, weights, options=StateDictOptions(strict=not new))
    elif isinstance(optimizer, EngineOptimizer):
        read(optimizer.named_state(), checkpoint)
        optimizer.filled()
    else:
        with ByParts():
            weights, moments = get_state_dict(model, optimizer)
        state, reader = (
            {"state": moments["state"]},
            _reader(checkpoint),
        )  # a resumed run may have been given other settings
        past = {f"{parameter_name(name)}.past" for name in histories(model)}
        new = past & _new_buffers(model, reader) if past else past
        weights = {name: value for name, value in weights.items() if name not in new}
        _fill({"model": weights, "optimizer": state}, reader, division=division_of(model))
        options = StateDictOptions(strict=not new)
        with ByParts():
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
    return manifest(checkpoint)


def _new_buffers(model: nn.Module, reader: dcp.StorageReader) -> set[str]:
    """The names of the model's buffers that a checkpoint has none of."""
    saved = reader.read_metadata().state_dict_metadata
    buffers = (parameter_name(name) for name, _ in model.named_buffers())
    return {name for name in buffers if f"model.{name}" not in saved}


def load_weights(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """`load` without the optimizer's state, into a model that it steps. Collective."""
    if not isinstance(optimizer, EngineOptimizer):
        return load(checkpoint, model, None)
    weights = optimizer.named_state()["model"]
    new = _new_buffers(model, _reader(checkpoint))
    read({"model": {name: value for name, value in weights.items() if name not in new}}, checkpoint)
    optimizer.filled()
    return manifest(checkpoint)


def load_moments(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Fills the optimizer's state, and not its settings: this run has its own. Collective."""
    if isinstance(optimizer, EngineOptimizer):
        read({"optimizer": optimizer.named_state()["optimizer"]}, checkpoint)
        optimizer.filled()
        return
    with ByParts():
        moments = get_optimizer_state_dict(model, optimizer)
    read({"optimizer": {"state": moments["state"]}}, checkpoint, division=division_of(model))
    with ByParts():
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
    with ByParts():
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
    _fill(state, _reader(checkpoint), alone=alone, division=division)


def _fill(state: dict[str, Any], reader: Any, *, alone: bool = False, division: Division | None = None) -> None:
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


def tensors(checkpoint: Path) -> set[str]:
    """The names of the model's tensors in a checkpoint or in a folder of Hugging Face's, those that are no parameters
    included. Raises DamagedError."""
    saved = _reader(checkpoint).read_metadata().state_dict_metadata
    return {name.removeprefix("model.") for name in saved if name.startswith("model.")}


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
        if checksum(checkpoint / name)[1] != crc:
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
