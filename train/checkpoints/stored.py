"""Tensors of torch's distributed checkpoint, read without unpickling anything.

torch keeps two kinds of pickles in a checkpoint: `.metadata`, which says where each piece of a tensor lies, and one in
front of each piece. Its own reader runs them, and those of entries of bytes freely. Here both are read as data
(`train.checkpoints.inert`), held against each other and against the sizes of the files, and entries of bytes do not
exist.
"""

import io
import math
import os
import zipfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from data import reading
from parallel.tensor import Division
from train.checkpoints.inert import Elsewhere, InertDict, Made, Name, parsed
from train.checkpoints.pieces import LogicalTensor, logical

METADATA = ".metadata"
LONGEST, LEAST = 1 << 28, 1 << 20  # bytes of a .metadata, whatever it says
_HEAD = 1 << 16  # bytes of what says a piece's shape
_STRETCH = 1 << 22  # bytes read at a time
_MOST_DIMS, _MOST_ELEMENTS = 16, 1 << 60
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class DamagedError(ValueError):
    """Why a checkpoint folder cannot be used."""

    @property
    def user_line(self) -> str:
        """Returns what a launcher says of it: no trace helps."""
        return str(self)


class CheckpointReader(dcp.FileSystemReader):
    """Reads a checkpoint that may come from elsewhere. Raises DamagedError for one that is not what torch has saved."""

    @cached_property
    def _parsed(self) -> Metadata:  # a load asks for it two or three times
        return metadata(Path(self.path))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._parsed

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        folder = Path(self.path)
        for item in sorted(plan.items, key=lambda item: self.storage_data[item.storage_index].relative_path):
            piece: StoredPiece = self.storage_data[item.storage_index]
            target = planner.resolve_tensor(item).detach()
            with reading.opened(folder / piece.relative_path) as file:
                whole = _piece(file, piece, item.storage_index.fqn)
            for dim, (begin, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                whole = whole.narrow(dim, begin, size)
            target.copy_(whole)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class TensorLoadPlanner(dcp.DefaultLoadPlanner):
    """Asks for tensors alone, as logical ones where a model is divided."""

    def __init__(self, division: Division | None = None):
        super().__init__()
        self.division = division

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict = logical(self.state_dict, self.mappings, self.division)

    def lookup_tensor(self, index: Any) -> torch.Tensor:
        tensor = self.state_dict[index.fqn]
        return tensor.at(index) if isinstance(tensor, LogicalTensor) else super().lookup_tensor(index)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise DamagedError(f"{read_item.dest_index.fqn}: is an entry of bytes, which is never loaded")


class TensorSavePlanner(dcp.DefaultSavePlanner):
    """Writes tensors as logical ones where a model is divided."""

    def __init__(self, division: Division | None = None):
        super().__init__()
        self.division = division

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.state_dict = logical(self.state_dict, self.mappings, self.division)

    def lookup_object(self, index: Any) -> Any:
        value = self.state_dict[index.fqn]
        return value.at(index) if isinstance(value, LogicalTensor) else super().lookup_object(index)


class StoredPiece(NamedTuple):
    """A piece of a tensor: its place in a file, the tensor that it is of, and its shape. The first three are torch's
    `_StorageInfo`."""

    relative_path: str
    offset: int
    length: int
    dtype: torch.dtype
    sizes: tuple[int, ...]


class _Slice(io.RawIOBase):
    """Some of a file's bytes, as a file."""

    def __init__(self, file: BinaryIO, begin: int, length: int):
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        to = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if to < 0:
            raise ValueError("a place before its beginning")
        self._at = to
        return to

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._begin + self._at)
        got = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += got
        return got


def metadata(folder: Path) -> Metadata:
    """Returns what a checkpoint's `.metadata` says of its tensors; entries of bytes are left out. Raises DamagedError.

    Every tensor's pieces cover it, lie within their files, and these in the folder.
    """
    try:  # a piece takes more in its file than here: a small checkpoint has no long .metadata, which takes time to read
        room = sum(path.stat().st_size for path in folder.glob("*.distcp") if path.is_file())
        return _metadata(folder, parsed(reading.content(folder / METADATA, min(LONGEST, LEAST + room))))
    except ValueError as error:
        line = str(error)
        raise DamagedError(line if line.startswith(METADATA) else f"its .metadata {line}") from None


def _metadata(folder: Path, node: Any) -> Metadata:
    whole = _fields(node, "Metadata")
    places = {
        (fqn, offsets): place
        for fqn, offsets, place in (
            _place(index, info) for index, info in _pairs(whole.get("storage_data"), "storage_data")
        )
    }
    sizes: dict[str, int] = {}
    entries: dict[str, Any] = {}
    where: dict[Any, Any] = {}
    for name, entry in _pairs(whole.get("state_dict_metadata"), "state_dict_metadata"):
        if not isinstance(name, str):
            raise ValueError("names a tensor by what is no text")
        if isinstance(entry, Made) and isinstance(entry.what, Name) and entry.what.name == "BytesStorageMetadata":
            continue
        shape, dtype, chunks = _tensor(name, entry)
        for offsets, extent in chunks:
            if (name, offsets) not in places:
                raise ValueError(f"does not say where {name} lies")
            path, begin, length = places[name, offsets]
            if path not in sizes:
                sizes[path] = size_in(folder, path)
            if begin + length > sizes[path] or math.prod(extent) * dtype.itemsize > length:
                raise ValueError(f"says that {name} lies beyond the end of {path}")
            where[MetadataIndex(name, offsets)] = StoredPiece(path, begin, length, dtype, extent)
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype=dtype),
            torch.Size(shape),
            [ChunkStorageMetadata(torch.Size(offsets), torch.Size(extent)) for offsets, extent in chunks],
        )
    return Metadata(entries, storage_data=where, storage_meta=StorageMeta())


def size_in(folder: Path, name: str) -> int:
    """Bytes of a file of a checkpoint. Raises ValueError for a name that leads out of it, and for no regular file."""
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"names {str(name)[:80]!r}, which is no file of the checkpoint")
    path = folder / name
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise ValueError(f"names {name}, a link out of the checkpoint")
    if not path.exists():
        raise ValueError(f"names {name}, which is missing")
    if not path.is_file():
        raise ValueError(f"names {name}, which is no regular file")
    return path.stat().st_size


def _tensor(name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype, list[tuple[Any, Any]]]:
    """Shape, dtype, and (offsets, sizes) of each piece."""
    fields = _fields(entry, "TensorStorageMetadata")
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, Made) and _is(properties.what, "TensorProperties") else None
    dtype = state[0] if isinstance(state, tuple) and len(state) == 5 else None
    if not isinstance(dtype, Name) or dtype.name not in _DTYPES:
        raise ValueError(f"gives {name} no dtype that a checkpoint has")
    shape, chunks = _size(name, fields.get("size")), fields.get("chunks")
    if not isinstance(chunks, list) or not chunks:
        raise ValueError(f"gives {name} no pieces")
    pieces = []
    for chunk in chunks:
        place = _fields(chunk, "ChunkStorageMetadata")
        pieces.append((_size(name, place.get("offsets")), _size(name, place.get("sizes"))))
    if not _cover(shape, pieces):
        raise ValueError(f"has pieces of {name} that do not make it up")
    return shape, _DTYPES[dtype.name], pieces


def _cover(shape: tuple[int, ...], pieces: list[tuple[Any, Any]]) -> bool:
    """Says whether each element is in exactly one piece."""
    for offsets, extent in pieces:
        inside = len(offsets) == len(extent) == len(shape)
        if not inside or any(o + e > s for o, e, s in zip(offsets, extent, shape, strict=True)):
            return False
    if sum(math.prod(extent) for _, extent in pieces) != math.prod(shape):
        return False
    if len(pieces) == 1 or not math.prod(shape):
        return True
    filled = [piece for piece in pieces if math.prod(piece[1])]
    dim = max(range(len(shape)), key=lambda d: len({offsets[d] for offsets, _ in filled}))
    filled.sort(key=lambda piece: piece[0][dim])
    for i, (offsets, extent) in enumerate(filled):
        for other, size in filled[i + 1 :]:
            if other[dim] >= offsets[dim] + extent[dim]:
                break
            if all(o < p + e and p < o + s for o, s, p, e in zip(other, size, offsets, extent, strict=True)):
                return False
    return True


def _place(index: Any, info: Any) -> tuple[str, Any, tuple[str, int, int]]:
    """A tensor's name and the offsets of a piece, and where that lies; the offsets are None of an entry of bytes."""
    key, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    fqn, offset = key.get("fqn"), key.get("offset")
    path, begin, length = place.get("relative_path"), place.get("offset", -1), place.get("length", -1)
    if not isinstance(fqn, str) or not isinstance(path, str) or not _is_count(begin) or not _is_count(length):
        raise ValueError("says of no tensor where it lies")
    if place.get("transform_descriptors"):
        raise ValueError(f"has {fqn} transformed, which no checkpoint of farspan's is")
    return fqn, None if offset is None else _size(fqn, offset), (path, begin, length)


def _fields(node: Any, kind: str) -> dict[str, Any]:
    """The attributes of an object of that class."""
    if not isinstance(node, Made) or not _is(node.what, kind):
        raise ValueError(f"has no {kind} where one must be")
    fields = {}
    for key, value in _pairs(node.state, kind):
        if not isinstance(key, str):
            raise ValueError(f"has a {kind} with an attribute that is no text")
        fields[key] = value
    return fields


def _pairs(node: Any, what: str) -> Iterable[tuple[Any, Any]]:
    if not isinstance(node, InertDict):
        raise ValueError(f"has no {what}")
    return node.items


def _is(node: Any, name: str) -> bool:
    return isinstance(node, Name) and node.name == name


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_ELEMENTS


def _size(name: str, node: Any) -> tuple[int, ...]:
    args = node.args if isinstance(node, Made) and _is(node.what, "Size") else None
    size = args[0] if isinstance(args, tuple) and len(args) == 1 else None
    if not isinstance(size, tuple) or len(size) > _MOST_DIMS or not all(map(_is_count, size)):
        raise ValueError(f"gives {name} no shape")
    if math.prod(size) >= _MOST_ELEMENTS:
        raise ValueError(f"gives {name} a shape that nothing can hold")
    return size


def _piece(file: BinaryIO, piece: StoredPiece, name: str) -> Tensor:
    """A piece of a tensor, from what `torch.save` wrote of it: a zip file, uncompressed, of its bytes and a pickle that
    says their shape. Raises DamagedError."""
    try:
        with zipfile.ZipFile(io.BufferedReader(_Slice(file, piece.offset, piece.length))) as archive:
            return _unzipped(archive, piece)
    except (
        *(zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, KeyError, IndexError, TypeError),
        *(EOFError, OSError, OverflowError, AttributeError),
    ) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedError(f"{piece.relative_path}: {name} cannot be read: {why}") from None


def _unzipped(archive: zipfile.ZipFile, piece: StoredPiece) -> Tensor:
    (head,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
    root = head.filename.removesuffix("data.pkl")
    if head.file_size > _HEAD:
        raise ValueError("what says its shape is too long")
    dtype, key, number, (offset, shape, stride) = _tensor_facts(parsed(_stored(archive, head).read()))
    if dtype != piece.dtype or shape != piece.sizes:
        raise ValueError(f"it is {dtype} {list(shape)}, .metadata says {piece.dtype} {list(piece.sizes)}")
    body = archive.getinfo(f"{root}data/{key}")
    if body.file_size != number * dtype.itemsize or body.file_size > piece.length:
        raise ValueError("its bytes are not as many as its shape asks for")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= number:
        raise ValueError("its shape reaches beyond its bytes")
    order = f"{root}byteorder"
    if order in archive.namelist() and _stored(archive, archive.getinfo(order)).read(16) != b"little":
        raise ValueError("its bytes are not in this machine's order")
    raw = torch.empty(body.file_size, dtype=torch.uint8)
    view, at = memoryview(raw.numpy()), 0  # type: ignore[arg-type]
    with _stored(archive, body) as stream:
        while at < len(view):
            got = stream.readinto(view[at : at + _STRETCH])
            if not got:
                raise EOFError("it is cut short")
            at += got
        stream.read(1)  # the end, where its checksum is held against it
    return raw.view(dtype).as_strided(shape, stride, offset)


def _stored(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """A member, open; none that unpacks to more than it is."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise ValueError(f"{info.filename} is compressed")
    return archive.open(info)


def _tensor_facts(node: Any) -> tuple[torch.dtype, str, int, tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Reads a saved tensor's dtype, the key and the length of its storage, and how it lies there."""
    args = node.args if isinstance(node, Made) and _is(node.what, "_rebuild_tensor_v2") else ()
    if not isinstance(args, tuple) or len(args) < 4 or not isinstance(args[0], Elsewhere):
        raise ValueError("it is no plain tensor")
    storage = args[0].told
    if not isinstance(storage, tuple) or len(storage) != 5 or storage[0] != "storage":
        raise ValueError("it has no storage")
    _, kind, key, _, number = storage
    offset, shape, stride = args[1:4]
    whole = isinstance(key, str) and key.isdigit() and _is_count(number) and _is_count(offset)
    sound = all(isinstance(x, tuple) and len(x) <= _MOST_DIMS and all(map(_is_count, x)) for x in (shape, stride))
    if not whole or not sound or len(shape) != len(stride) or not isinstance(kind, Name) or kind.name not in _STORAGES:
        raise ValueError("its shape is not whole")
    return _STORAGES[kind.name], key, number, (offset, shape, stride)
