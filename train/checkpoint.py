"""Checkpoints: complete or absent.

A checkpoint is written aside (`step-N.partial`), its manifest last, and renamed to `step-N` when every byte is on disk.
The manifest lists each file with its size and CRC-32, so a truncated or altered one is detected and the one before it
is used. Tensors are saved by torch's distributed checkpoint: any world size loads what any other has saved.
"""

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
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

from parallel.apply import parameter_name
from train.published import Published, PublishedReader, is_folder

MANIFEST, FORMAT = "manifest.json", 1


class DamagedError(Exception):
    """Why a checkpoint folder cannot be used."""


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    facts: dict[str, Any],
    *,
    keep: int,
    companions: Sequence[Path] = (),
    average: dict[str, Any] | None = None,
) -> Path:
    """Writes `folder/step-N` from every rank and keeps the newest `keep`. Returns its path. Collective.

    companions: files that travel with it, so that it is of use without its run: configuration, tokenizer, corpus card.
    average: what `train.average` has to go on from.
    """
    final = folder / f"step-{facts['step']}"
    aside = final.with_suffix(".partial")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for companion in companions:
            shutil.copyfile(companion, aside / companion.name)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    averaged = {} if average is None else {"average": average}
    dcp.save({"model": weights, "optimizer": moments, **averaged}, checkpoint_id=str(aside))
    names = {".metadata", *(companion.name for companion in companions)} if first else set()
    mine = [p for p in aside.iterdir() if p.name.startswith(f"__{dist.get_rank()}_") or p.name in names]
    sums: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sums, {p.name: _checksum(p, sync=True) for p in mine})
    if first:
        named = model.named_parameters()
        tensors = {parameter_name(n): [list(p.shape), str(p.dtype).removeprefix("torch.")] for n, p in named}
        files = {name: value for part in sums for name, value in part.items()}
        manifest = {"format": FORMAT, **facts, "model": tensors, "files": files}
        _write(aside / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync_folder(folder)
        prune(folder, facts["step"], keep=keep)
    dist.barrier()
    return final


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of a checkpoint whose files are all there, written by one process."""
    files = {p.name: _checksum(p, sync=True) for p in sorted(checkpoint.iterdir())}
    _write(checkpoint / MANIFEST, json.dumps({"format": FORMAT, **facts, "files": files}, indent=1))


def prune(folder: Path, step: int, *, keep: int) -> None:
    """Keeps the newest `keep` checkpoints up to `step`, which has just been written.

    A later one is of an attempt that was passed over as damaged: it must not push a good one out. Half-written ones go.
    """
    found = complete(folder)
    kept = [p for p in found if _step(p) <= step][-keep:]
    for old in (*(p for p in found if p not in kept), *folder.glob("step-*.partial")):
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
        read({"model": weights}, checkpoint)
        set_model_state_dict(model, weights, options=StateDictOptions(strict=not new))
    else:
        weights, moments = get_state_dict(model, optimizer)
        state = {"state": moments["state"]}  # and not its settings: a resumed run may have been given others
        read({"model": weights, "optimizer": state}, checkpoint)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return manifest(checkpoint)


def load_moments(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Fills the optimizer's state, and not its settings: this run has its own. Collective."""
    moments = get_optimizer_state_dict(model, optimizer)
    read({"optimizer": {"state": moments["state"]}}, checkpoint)
    set_optimizer_state_dict(model, optimizer, moments)


def has_moments(checkpoint: Path) -> bool:
    """Whether a checkpoint holds an optimizer's state; a folder of Hugging Face's has none. Raises DamagedError."""
    if not (checkpoint / ".metadata").exists():
        return False
    saved = _Reader(str(checkpoint)).read_metadata().state_dict_metadata
    return any(name.startswith("optimizer.state.") for name in saved)


def load_average(checkpoint: Path, model: nn.Module) -> None:
    """Fills the model's parameters from the averaged weights; what it remembers besides stays. Collective."""
    averaged = {parameter_name(name): p.detach() for name, p in model.named_parameters()}
    read({"average": {"mean": averaged}}, checkpoint)


def read(state: dict[str, Any], checkpoint: Path, *, alone: bool = False) -> None:
    """Fills a state dict in place from a checkpoint's files; `alone`: without a process group."""
    dcp.load(state, storage_reader=_reader(checkpoint), no_dist=alone)


def _reader(checkpoint: Path) -> dcp.StorageReader:
    """Of a checkpoint of ours, or of a folder of Hugging Face's."""
    return PublishedReader(checkpoint) if is_folder(checkpoint) else _Reader(str(checkpoint))


class _Reader(dcp.FileSystemReader):
    """A checkpoint may come from elsewhere: torch unpickles `.metadata` freely, this reader only its own classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            found = _MetadataUnpickler(file).load()
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _MetadataUnpickler(pickle.Unpickler):
    NAMES = {
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", "float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"),
        "pathlib": ("PosixPath", "WindowsPath"),
        "pathlib._local": ("PosixPath", "WindowsPath"),  # what Python 3.13 writes
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.NAMES.get(module, ()):
            raise DamagedError(f"its .metadata names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def complete(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first."""
    found = [p for p in folder.glob("step-*") if p.suffix != ".partial" and (p / MANIFEST).exists()]
    return sorted(found, key=_step)


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
        found = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"its manifest cannot be read: {error}") from None
    if found.get("format") != FORMAT:
        raise DamagedError(f"its format is {found.get('format')}, this version reads {FORMAT}")
    return found


def verify(checkpoint: Path) -> None:
    """Raises DamagedError naming the first file that is missing, cut or altered."""
    for name, (size, crc) in manifest(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.exists():
            raise DamagedError(f"{name} is missing")
        if path.stat().st_size != size:
            raise DamagedError(f"{name} has {path.stat().st_size:,} of {size:,} bytes")
        if _checksum(path)[1] != crc:
            raise DamagedError(f"{name} has been altered")


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


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _checksum(path: Path, *, sync: bool = False) -> tuple[int, int]:
    """(bytes, CRC-32) of a file; with `sync`, after it has reached the disk."""
    crc, size = 0, 0
    with path.open("rb+" if sync else "rb") as file:
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
