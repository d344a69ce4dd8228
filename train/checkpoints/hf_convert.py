"""Hugging Face's folders to checkpoints of ours, and back, a few rows of a tensor at a time.

Neither ever holds the model: an import holds a stretch of one parameter, an export one published tensor and the two
parameters that it is made of. What is written has another name until it is whole.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from models.hub import of_model, tensors
from models.hub.architecture import Config, layers
from models.hub.rows import RowPlace, published
from parallel.activation_memory import give_back_large
from train.checkpoints import checkpoint
from train.checkpoints.hf_reader import CONFIG, named_shapes
from train.instantiate import construct
from train.rope_base import following, rebase, rotary

SHARD = 5_000_000_000  # bytes of a file, unless told otherwise
PARTIAL = ".partial"
PRECISE = ("norm.weight", ".A_log", ".dt_bias", ".D", ".selection_bias")  # stay as they are at a lower precision


class ModelSource(Protocol):
    """A model's parameters, of which rows can be read: `Published` is one."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def stretches(self, name: str) -> Iterator[tuple[int, int]]:
        """Rows [begin, end) of a parameter, in parts."""

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """These rows."""

    def manifest(self) -> dict[str, Any]:
        """Returns what a checkpoint's manifest says of the model."""


class _Streamed(SavePlanner):
    """Saves what a source reads, stretch by stretch: each is read when its turn to be written has come."""

    def __init__(self, folder: ModelSource, watch: Callable[[str], None]):
        self.folder, self.watch = folder, watch
        self._last: Tensor | None = None

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        names = {f"model.{name}": ("model", name) for name in self.folder.shapes}
        return SavePlan(list(self._items()), planner_data=names)

    def _items(self) -> Iterator[WriteItem]:
        for name, shape in self.folder.shapes.items():
            for begin, end in self.folder.stretches(name):
                offsets = torch.Size([begin, *[0] * (len(shape) - 1)])
                chunk = ChunkStorageMetadata(offsets, torch.Size([end - begin, *shape[1:]]))
                properties = TensorProperties(dtype=self.folder.dtypes[name])
                data = TensorWriteData(chunk, properties, torch.Size(shape))
                yield WriteItem(MetadataIndex(f"model.{name}", offsets), WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = dcp.default_planner.create_default_global_save_plan(all_plans)
        metadata.planner_data = all_plans[0].planner_data
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name = write_item.index.fqn.removeprefix("model.")
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        self.watch(name)
        if self._last is not None:  # it is on the disk: the writer keeps all that it has written until the end
            self._last.untyped_storage().resize_(0)
        read = self.folder.read(name, chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
        self._last = read.clone(memory_format=torch.contiguous_format)
        return self._last


def take(folder: ModelSource, run: Path, companions: dict[str, str], watch: Callable[[str], None]) -> Path:
    """Writes a source's model as `run`, which must not exist: a run of no steps, whose checkpoint is `step-0`.

    companions: the files beside the weights, by name their text. watch: is told each parameter whose turn has come.
    Returns the checkpoint. Raises OSError for a disk that is full, ValueError for files that have changed meanwhile.
    """
    aside = run.with_name(run.name + PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)
    step = aside / "checkpoints" / "step-0"
    step.mkdir(parents=True)
    give_back_large()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that no process group is there; none is needed
            writer = dcp.FileSystemWriter(str(step), thread_count=1)
            try:
                dcp.save({}, storage_writer=writer, planner=_Streamed(folder, watch), no_dist=True)
            except CheckpointException as error:  # what went wrong is inside
                raise error.failures[0][0] from None
        for name, text in companions.items():
            for place in (aside, step):
                (place / name).write_text(text)
        facts = {"step": 0, "tokens": 0, "skips": 0, "attempt": 0, "seed": None, "data": None}
        checkpoint.seal(step, facts | folder.manifest())
        aside.rename(run)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return run / "checkpoints" / "step-0"


class Saved:
    """A checkpoint of ours to be published. Nothing but its metadata is read until `tensor` is called.

    config: the run's, resolved. average: what train.average keeps in the weights' place, which must be there.
    left_out, why: parameters of multi-token prediction that the architecture cannot say, and the reason. Raises
    ValueError for a model that no architecture can express: the key that stands in the way.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, average: bool = False):
        self.path, self.average, model = path, average, config["model"]
        facts = checkpoint.manifest(path)
        with torch.device("meta"):
            built = construct(model)
        if base := facts.get("rope_theta"):  # what the curriculum has made of it
            rebase(built, base)
            model = rebased(model, base) if rotary(built) else model
        came = facts.get("published") or {}
        architecture, self.config = of_model(model, came.get("architecture"))
        self.why, modules = "", model.get("mtp_layers") or 0
        if modules:
            try:
                self.config = architecture.with_modules(self.config, model)
            except ValueError as error:
                self.why, modules = str(error), 0
        if not modules and architecture.mtp is not None:  # which some readers expect where nothing is said
            self.config = {**self.config, architecture.mtp.key: 0}
        self.name = architecture.name
        self._entries = architecture.rows(self.config)
        shapes = named_shapes(built, self._entries)
        self.left_out = [] if modules else sorted(name for name in shapes if name.startswith("mtp."))
        self.shapes = {name: shape for name, shape in shapes.items() if name not in self.left_out}
        self._averaged = {name for name, _ in built.named_parameters()}
        self.published = architecture.stacked(published(self._entries, self.shapes))
        self.published |= {name: self.published[of] for name, of in architecture.repeated(self.config).items()}
        scaled = ("norm.weight", "norm.bias") if built.head is None else ()
        self._scales = dict.fromkeys(scaled, built.tied_scale)
        self._dtypes = dict.fromkeys(self.shapes, "float32")  # as buffers are
        self._dtypes |= {name: dtype for name, (_, dtype) in facts["model"].items()}
        self._own = lru_cache(maxsize=2)(self._read)
        trained = trained_length(config, facts.get("places", facts["tokens"]))
        self.max_length = max(trained or 0, came.get("positions") or 0) or None  # never less than it came with

    def order(self) -> list[str]:
        """The published tensors, layer by layer as the model has them."""
        place = {name: i for i, name in enumerate(self.shapes)}
        return sorted(self.published, key=lambda source: place[self.published[source][1][0].name])

    def dtype(self, source: str, wanted: torch.dtype | None = None) -> torch.dtype:
        """Returns what the checkpoint holds a published tensor in, or `wanted` where that may be chosen."""
        name = self.published[source][1][0].name
        held: torch.dtype = getattr(torch, self._dtypes[name])
        return held if wanted is None or name.endswith(PRECISE) else wanted

    def tensor(self, source: str) -> Tensor:
        """A published tensor, of our parameters' rows. The last two parameters are kept for those that follow."""
        shape, places = self.published[source]
        tensor = torch.cat([self._rows(place) for place in places]) if len(places) > 1 else self._rows(places[0])
        return tensor.view(shape)

    def _rows(self, place: RowPlace) -> Tensor:
        form = self._entries[place.name].form
        unit = form.unit(self.shapes[place.name])
        first, last = place.start // unit, -(-(place.start + place.number) // unit)
        own = self._own(place.name)[first:last]
        return form.there(own)[place.start - first * unit :][: place.number]

    def _read(self, name: str) -> Tensor:
        value = torch.empty(self.shapes[name], dtype=getattr(torch, self._dtypes[name]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            averaged = self.average and name in self._averaged
            held = {"average": {"mean": {name: value}}} if averaged else {"model": {name: value}}
            checkpoint.read(held, self.path, alone=True)
        return value * self._scales[name] if name in self._scales else value


def give(
    saved: Saved,
    dest: Path,
    files: dict[str, str],
    *,
    config: Config,
    longest: int = SHARD,
    dtype: torch.dtype | None = None,
    watch: Callable[[str], None] = lambda source: None,
) -> None:
    """Writes a checkpoint as a folder that `transformers` loads; `dest` must not exist.

    files: what lies beside the weights, by name its text. config: what config.json says besides. longest: bytes of a
    file of weights. dtype: of the weights, but for norms, decays and step sizes, which lose more by it than they save
    (`PRECISE`); None for that of the checkpoint.
    """
    aside, files = dest.with_name(dest.name + PARTIAL), dict(files)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    give_back_large()
    try:
        kinds = {source: saved.dtype(source, dtype) for source in saved.order()}
        sizes = {source: math.prod(saved.published[source][0]) * kinds[source].itemsize for source in kinds}
        shards = tensors.shards(sizes, longest)
        names = [tensors.SINGLE]
        if len(shards) > 1:
            names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
            index = {"metadata": {"total_size": sum(sizes.values())}}
            files[tensors.INDEX] = json.dumps(
                index | {"weight_map": {s: name for name, part in zip(names, shards, strict=True) for s in part}},
                indent=2,
            )
        for name, part in zip(names, shards, strict=True):
            sources = {source: (saved.published[source][0], kinds[source]) for source in part}
            tensors.write(aside / name, sources, _streamed(saved, part, watch))
        most = max(kinds, key=lambda source: sizes[source])  # of the largest tensor
        told_config = {**saved.config, **config, "dtype": str(kinds[most]).removeprefix("torch.")}
        files[CONFIG] = json.dumps(told_config, indent=2)
        for name, text in files.items():
            with (aside / name).open("w", encoding="utf-8") as file:
                file.write(text if text.endswith("\n") or not name.endswith(".json") else text + "\n")
                file.flush()
                os.fsync(file.fileno())
        aside.rename(dest)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _streamed(saved: Saved, part: list[str], watch: Callable[[str], None]) -> Iterator[Tensor]:
    for source in part:
        watch(source)
        yield saved.tensor(source)


def rebased(model: dict[str, Any], base: float) -> dict[str, Any]:
    """The section with this base in the rotary rules that `rope_base.rebase` changes."""
    blocks = dict(model["blocks"])
    rotating = [(name, block) for name, block in layers(model) if _rotary_base(block["mixer"]) is not None]
    follows = following([(block["mixer"].get("window"), _rotary_base(block["mixer"])) for _, block in rotating])
    for (name, block), moves in zip(rotating, follows, strict=True):
        if moves:
            rope = {**block["mixer"]["positions"], "base": base}
            blocks[name] = {**blocks[name], "mixer": {**block["mixer"], "positions": rope}}
    return {**model, "blocks": blocks}


def _rotary_base(mixer: dict[str, Any]) -> Any:
    rope = mixer.get("positions")
    return rope.get("base") if isinstance(rope, dict) else None


def trained_length(config: dict[str, Any], tokens: int) -> int | None:
    """The longest sequences that a run has had after so many tokens of its order; None where it does not say."""
    stages = (config.get("curriculum") or {}).get("context")
    if stages:
        return max(length for begin, length, _ in stages if begin <= tokens)
    return (config.get("data") or {}).get("max_length")
