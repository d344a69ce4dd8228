"""A trained model as a Hugging Face folder: its tensors, configuration and tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.config.model import model_of
from launch.errors import UserError
from launch.run import rundir
from launch.run.checkpoints import has_average
from train.settings import INIT_WEIGHTS, InitWeights

if TYPE_CHECKING:
    from train.checkpoints.hf_convert import Saved


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


ExportDtype = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """max_shard: the most bytes of a file of weights, as 5GB. dtype: fp32, bf16 or fp16; null for the checkpoint's.
    weights: raw, those that were trained, or average, what train.average keeps of them."""

    max_shard: str | int = "5GB"
    dtype: ExportDtype | None = None
    weights: InitWeights = "raw"

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise ValueError(f"max_shard={self.max_shard}: must be a size, as 5GB, 500MB or a number of bytes")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype}: must be one of {', '.join(_DTYPES)}")
        if self.weights not in INIT_WEIGHTS:
            raise ValueError(f"weights={self.weights}: must be one of {', '.join(INIT_WEIGHTS)}")

    @property
    def shard(self) -> int:
        """Bytes; 0 for what is no size."""
        match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) ?([KMG]B|)", str(self.max_shard).upper())
        return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def written(source: Path, dest: Path, request: Export | None = None) -> list[str]:
    """Writes a checkpoint of ours as a folder that transformers loads. Returns what there is to say.

    Raises ValueError, before anything is written, for a model that no architecture expresses, and UserError for a disk
    that cannot be written to.
    """
    import torch

    from train.checkpoints.hf_convert import Saved, give

    request = request or Export()
    if request.weights == "average" and not has_average(source):
        raise UserError(f"weights=average: must be raw, {source} holds no averaged weights (train.average)")
    saved_run = rundir.saved_config(source)
    model_of(saved_run["model"])  # refuses what only a file from elsewhere says
    saved = Saved(source, saved_run, average=request.weights == "average")
    files, files_and_lines = _files(source, saved)
    dtype = None if request.dtype is None else getattr(torch, _DTYPES[request.dtype])
    with _progress("writing") as watch, _disk(dest, "DEST"):
        give(saved, dest, files, config=files_and_lines, longest=request.shard, dtype=dtype, watch=watch)
    lines = [f"{saved.name}, {_size(saved.shapes)} parameters, from {source}: {dest}"]
    if saved.left_out:
        names = f"{saved.left_out[0]} and {len(saved.left_out) - 1} others"
        key = f"model.mtp_layers={saved_run['model']['mtp_layers']}"
        lines.append(f"left out: {names} ({key}): {saved.why}")
    if "tokenizer.json" not in files:
        lines.append("without a tokenizer: what the tokens spell is not known")
    return lines


def _files(saved_run: Path, saved: Saved) -> tuple[dict[str, str], dict[str, Any]]:
    """The text of what lies beside the weights, and what config.json says besides the model. Raises ValueError."""
    from data import reading
    from data.hf_tokenizer import files, ids_of

    path = saved_run / "tokenizer.json"
    card = reading.json_object(path) if path.exists() else {}
    generation: dict[str, Any] = {**ids_of(card), "use_cache": True}
    if saved.max_length is not None and "rope_parameters" in saved.config:
        generation["max_position_embeddings"] = saved.max_length
    beside = files(card, saved.max_length)
    if "files" not in card:  # else they are as they came
        ids = {key: generation[key] for key in ("bos_token_id", "eos_token_id")}
        beside["generation_config.json"] = json.dumps(ids, indent=2)
    return beside, generation


@contextmanager
def _disk(path: Path, key: str) -> Iterator[None]:
    """A disk that cannot be written to is the user's to know of, in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{key}={path}: cannot be written ({error.strerror})") from None


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    """Shows in a terminal which tensor has its turn."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, emoji=False)
    with console.status(what) as status:
        yield lambda name: status.update(f"{what} {name}")


def _size(shapes: dict[str, tuple[int, ...]]) -> str:
    from math import prod

    return f"{sum(prod(shape) for shape in shapes.values()):,}"
