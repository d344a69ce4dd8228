"""A folder of Hugging Face's read as a checkpoint of ours: `init_from` takes it as it lies, each rank its own rows.

torch's distributed checkpoint asks a reader for parts of tensors by our names. This one finds the published rows that
make them up (`models.hub`) and reads those, a few megabytes at a time, from safetensors files alone: no weights that
are pickled are opened, and no code that a folder brings is run.
"""

import math
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from models.hub import of_config, of_model, tensors, text_of
from models.hub.architecture import Config
from models.hub.rows import Entries, parts, published
from train.instantiate import construct

CONFIG = "config.json"
STRETCH = 1 << 23  # bytes that are read at a time
VOCABULARY = ("embedding", "head.weight")  # parameters with a row a token
MOST_ROWS = 1 << 24  # no tokenizer has as many tokens
HEAD = "lm_head.weight"  # in every architecture

Files = dict[str, tensors.StoredTensor]


def is_folder(path: Path) -> bool:
    """Says whether a folder is one of Hugging Face's models, and no run and no checkpoint of ours."""
    return (path / CONFIG).is_file() and not (path / "config.yaml").exists()


class Published:
    """A folder's model, as one of ours. Nothing is read but headers until `read` is called.

    vocabulary: rows of the embedding and the head wanted; null for those that there are. extend: whether there may be
    more of them, each the mean of those that there are: the likelihoods of known tokens then change least (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models"). mtp: whether modules of multi-token prediction
    come in, where the family's are known.

    model: the `model` section. shapes, dtypes: of our parameters, an attribute each. left_out: tensors of the folder
    that no model of ours reads, and that `transformers` does not read either. said: what there is to say of it.
    unpublishable: why no export can say this model, null where one can.

    Raises ValueError, one line that names the file and what is wrong in it, for an architecture or a setting that is
    not ours, a tensor that is missing, too many or of another shape, a file that is cut short, and pickled weights.
    """

    def __init__(self, path: Path, *, vocabulary: int | None = None, extend: bool = False, mtp: bool = True):
        self.path, config = path, text_of(tensors.table(path / CONFIG))
        architecture = of_config(config)
        architecture.complete(config)  # refuses what its keys may not be
        stored = architecture.unstacked(tensors.folder(path))
        architecture.bounded(config, stored)
        config, others = architecture.held(config, stored, mtp=mtp)
        self.config, self._stored, self.said = _untied(config, stored, architecture.rows(config))
        self.name, self.model = architecture.name, architecture.read(self.config)
        self._entries = architecture.rows(self.config)
        with torch.device("meta"):
            try:
                built = construct(self.model)
            except ValueError as error:
                raise ValueError(f"config.json: {error}") from None
        self.shapes = named_shapes(built, self._entries)
        self._parameters = {name for name, _ in built.named_parameters()}
        wanted = {source: shape for source, (shape, _) in published(self._entries, self.shapes).items()}
        self._repeated = dict[str, list[str]]()  # tensors that repeat one that is read, by its name
        for name, source in architecture.repeated(self.config).items():
            if name in stored:
                wanted[name] = wanted[source]
                self._repeated.setdefault(source, []).append(name)
        self.left_out = self._compare(wanted, (*architecture.left_out, *others))
        self.dtypes = {name: self._dtype(name) for name in self.shapes}
        self.max_length: int | None = architecture.complete(self.config).get("max_position_embeddings")
        self.unpublishable = _why_not(self.model, self.name)
        self._rows = dict(self.shapes)  # as they are in the folder
        self._means: dict[str, Tensor] = {}
        self._extend(vocabulary, extend)

    def _compare(self, wanted: dict[str, tuple[int, ...]], others: tuple[str, ...]) -> list[str]:
        """Holds the folder's tensors against those that its configuration asks for. Returns what is left out."""
        for name, shape in wanted.items():
            if name not in self._stored:
                raise ValueError(f"{name} {list(shape)}: missing from {self.path.name}")
            stored = self._stored[name]
            if stored.shape != shape:
                raise ValueError(f"{stored.file.name}: {name} is {list(stored.shape)}, must be {list(shape)}")
        extra = [name for name in self._stored if name not in wanted]
        if self.config.get("tie_word_embeddings"):
            others = (*others, HEAD)  # some folders hold it twice
        for name in extra:
            if not any(name.startswith(o) or name.endswith(o) for o in others):
                raise ValueError(f"{self._stored[name].file.name}: {name}: no tensor of {self.name} of this shape")
        return extra

    def _dtype(self, name: str) -> torch.dtype:
        entry = self._entries[name]
        dtype = reduce(torch.promote_types, (self._stored[piece.source].dtype for piece in entry.pieces))
        computed = entry.form.computed or any(piece.factor != 1 for piece in entry.pieces)
        return torch.promote_types(dtype, torch.float32) if computed else dtype

    def _extend(self, vocabulary: int | None, extend: bool) -> None:
        has: int = self.model["vocabulary"]
        wanted = has if vocabulary is None else vocabulary
        if wanted < has:
            raise ValueError(f"vocabulary={wanted}: must be at least {has}, the tokens of {self.path.name}")
        if wanted > MOST_ROWS:
            raise ValueError(f"vocabulary={wanted}: must be at most {MOST_ROWS}")
        if wanted > has and not extend:
            raise ValueError(
                f"vocabulary={wanted}: {self.path.name} has {has}; extend_vocab=true adds rows, each their mean"
            )
        self.model = {**self.model, "vocabulary": wanted}
        for name in VOCABULARY:
            if name in self.shapes:
                self.shapes[name] = (wanted, *self.shapes[name][1:])

    def manifest(self) -> dict[str, Any]:
        """Returns what a checkpoint's manifest would say of the model."""
        weights = {n: s for n, s in self.shapes.items() if n in self._parameters}
        shapes = {n: [list(s), str(self.dtypes[n]).removeprefix("torch.")] for n, s in weights.items()}
        return {"model": shapes, "published": {"architecture": self.name, "positions": self.max_length}}

    def verify(self) -> None:
        """Reads every number. Raises ValueError for one that is not finite, and for a file that is cut short."""
        for name in self.shapes:
            for begin, end in self.stretches(name, 0, self._rows[name][0]):
                self.read(name, begin, end)

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of a parameter of ours, in the dtype that the folder has it in."""
        form, have = self._entries[name].form, self._rows[name][0]
        unit = form.unit(self.shapes[name])
        pieces = parts(self._entries[name].pieces, begin * unit, min(end, have) * unit)
        blocks = [self._published(*piece[:3]).to(self.dtypes[name]) for piece in pieces]
        for block, piece in zip(blocks, pieces, strict=True):
            if piece.factor != 1:
                block *= piece.factor
        ours = [form.here(blocks[0] if len(blocks) == 1 else torch.cat(blocks)).to(self.dtypes[name])] if blocks else []
        if end > have:
            ours.append(self._mean(name).expand(end - max(begin, have), *self.shapes[name][1:]))
        return ours[0] if len(ours) == 1 else torch.cat(ours)

    def _published(self, source: str, start: int, number: int) -> Tensor:
        """Rows of a published tensor. Raises ValueError for a number that is not finite, and where a tensor that
        repeats it has others."""
        stored = self._stored[source]
        rows = tensors.rows(stored, start, number)
        for name in self._repeated.get(source, ()):
            if not torch.equal(rows, tensors.rows(self._stored[name], start, number)):
                raise ValueError(f"{self._stored[name].file.name}: {name}: must hold the numbers of {source}, as here")
        if not torch.isfinite(rows).all():
            raise ValueError(f"{stored.file.name}: {source}: holds numbers that are not finite (NaN or infinity)")
        return rows

    def stretches(self, name: str, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """[begin, end) in parts of about `STRETCH` bytes."""
        shape = self.shapes[name]
        step = max(1, STRETCH // (math.prod(shape[1:]) * self.dtypes[name].itemsize or 1))
        end = shape[0] if end is None else end
        return ((at, min(at + step, end)) for at in range(begin, end, step))

    def _mean(self, name: str) -> Tensor:
        if name not in self._means:
            have = self._rows[name][0]
            sums = [self.read(name, *part).double().sum(0) for part in self.stretches(name, 0, have)]
            self._means[name] = (torch.stack(sums).sum(0) / have).to(self.dtypes[name])
        return self._means[name]


class PublishedReader(StorageReader):
    """`Published` for torch's distributed checkpoint: parameters under `model.`, each as one piece."""

    def __init__(self, path: Path):
        self.folder = Published(path)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {}
        for name, shape in self.folder.shapes.items():
            size, whole = torch.Size(shape), ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
            entries[f"model.{name}"] = TensorStorageMetadata(
                properties=TensorProperties(dtype=self.folder.dtypes[name]), size=size, chunks=[whole]
            )
        names = {f"model.{name}": ("model", name) for name in self.folder.shapes}
        return Metadata(entries, planner_data=names, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name = item.storage_index.fqn.removeprefix("model.")
            target = planner.resolve_tensor(item).detach()
            begin, rows = item.storage_offsets[0], item.lengths[0]
            for first, last in self.folder.stretches(name, begin, begin + rows):
                part = self.folder.read(name, first, last)
                for dim in range(1, part.ndim):
                    part = part.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
                target[first - begin : last - begin].copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return is_folder(Path(checkpoint_id))


def named_shapes(model: nn.Module, entries: Entries) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters, and of buffers that are published, as a router's bias."""
    buffers = {name: tuple(b.shape) for name, b in model.named_buffers() if name in entries}
    return {name: tuple(p.shape) for name, p in model.named_parameters()} | buffers


def _untied(config: Config, stored: Files, entries: Entries) -> tuple[Config, Files, list[str]]:
    """Returns what a folder's head is, as `transformers` reads it: its own where it holds another than the embedding,
    whatever
    the configuration says of the two; and the embedding, where only the head is there. With what there is to say."""
    if not config.get("tie_word_embeddings") or HEAD not in stored:
        return config, stored, []
    embedding = entries["embedding"].pieces[0].source
    if embedding not in stored:
        return config, {embedding if name == HEAD else name: each for name, each in stored.items()}, []
    if _same(stored[embedding], stored[HEAD]):
        return config, stored, []
    line = f"tie_word_embeddings=true, but {HEAD} is another than {embedding}: both are kept, as transformers does"
    return {**config, "tie_word_embeddings": False}, stored, [line]


def _same(one: tensors.StoredTensor, other: tensors.StoredTensor) -> bool:
    """Says whether two tensors hold the same numbers."""
    if one.shape != other.shape:
        return False
    step = max(1, STRETCH // (math.prod(one.shape[1:]) * one.dtype.itemsize or 1))
    return all(
        torch.equal(*(tensors.rows(each, at, min(step, each.shape[0] - at)).double() for each in (one, other)))
        for at in range(0, one.shape[0], step)
    )


def _why_not(model: dict[str, Any], origin: str) -> str | None:
    """Returns what stands in the way of an export, null where nothing does."""
    try:
        of_model(model, origin)
    except ValueError as error:
        return str(error)
    return None
