"""Files of tensors in the safetensors format, read and written a few rows at a time.

Eight bytes, the length of a JSON header; the header, {name: {dtype, shape, data_offsets}}; then the tensors' bytes, row
by row. That is all of it, and nothing in it can be run. It is read here with plain reads, not through a map of the
file: what has been read from a map stays in the process's resident memory until the file is closed, all of a shard.
"""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
LONGEST_TEXT = 100_000_000  # bytes of a file of JSON
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class StoredTensor(NamedTuple):
    """The place of a tensor. begin: its first byte in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def regular(path: Path) -> int:
    """The bytes of a file. Raises ValueError for what is none: a pipe or a device would never end."""
    try:
        facts = path.stat()
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path.name}: is no regular file")
    return facts.st_size


def table(path: Path) -> dict[str, Any]:
    """The object of a file of JSON. Raises ValueError."""
    if regular(path) > LONGEST_TEXT:
        raise ValueError(f"{path.name}: has more than {LONGEST_TEXT:,} bytes")
    try:
        return parsed(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror})") from None
    except TypeError:
        raise ValueError(f"{path.name}: is not a JSON object") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name}: is not JSON") from None


def parsed(text: bytes) -> dict[str, Any]:
    """The object of a text of JSON. Raises TypeError for something else, ValueError, RecursionError for no JSON."""
    value = json.loads(text.decode("utf-8"))
    if not isinstance(value, dict):
        raise TypeError(type(value))
    return value


def header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, which must hold every byte of them, once. Raises ValueError."""
    size = regular(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"{path.name}: is cut short, or no safetensors file")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror})") from None
    try:
        entries = parsed(text)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{path.name}: is no safetensors file: its header is not JSON") from None
    entries.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in entries.items()}
    at, before = 8 + length, "the header"
    for name, each in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].size)):
        if each.begin != at:  # the format allows neither
            kind = "lies over" if each.begin < at else "leaves a gap behind"
            raise ValueError(f"{path.name}: {name}: {kind} {before}")
        at, before = each.begin + each.size, name
    if size < at:
        raise ValueError(f"{path.name}: is cut short: it has {size:,} of {at:,} bytes")
    return tensors


def _stored(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """A header's entry. Raises ValueError."""
    try:
        dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end)) and len(shape) <= 64
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path.name}: {name}: its entry in the header is not whole") from None
    if dtype not in DTYPES:
        raise ValueError(f"{path.name}: {name}: dtype {dtype[:20]} must be one of {', '.join(DTYPES)}")
    if not sound or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{path.name}: {name}: its shape and its bytes do not fit")
    return StoredTensor(path, DTYPES[dtype], shape, data + begin)


def rows_of(stored: StoredTensor, start: int, number: int) -> StoredTensor:
    """Rows of a tensor [n, rows, ...], those of all n counted on, as a tensor of its own; no byte is moved."""
    each = math.prod(stored.shape[2:]) * stored.dtype.itemsize
    return StoredTensor(stored.file, stored.dtype, (number, *stored.shape[2:]), stored.begin + start * each)


def folder(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder: of the files that its index names, or of its one file. Raises ValueError."""
    if (path / INDEX).exists():
        files = _indexed(path)
    elif (path / SINGLE).exists():
        files = {SINGLE: None}
    else:
        pickled = sorted(file.name for kind in PICKLED for file in path.glob(kind))
        if pickled:
            raise ValueError(f"{pickled[0]}: is pickled, and may run code when it is opened; expected {SINGLE}")
        raise ValueError(f"{SINGLE}: missing, and no {INDEX}")
    stored: dict[str, StoredTensor] = {}
    for file, names in files.items():
        if not (path / file).exists():
            raise ValueError(f"{file}: missing")
        tensors = header(path / file)
        if names is not None and (lost := names - tensors.keys()):
            raise ValueError(f"{file}: {min(lost)}: missing")
        if twice := stored.keys() & tensors.keys():
            raise ValueError(f"{file}: {min(twice)}: is in another file, too")
        stored |= tensors
    return stored


def _indexed(path: Path) -> dict[str, set[str] | None]:
    """Groups the tensors of an index by file. Raises ValueError."""
    try:
        weight_map = table(path / INDEX)["weight_map"]
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if "\0" in file or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{INDEX}: {name}: {file}: must be a safetensors file of the folder")
            files.setdefault(file, set()).add(name)  # type: ignore[union-attr]
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{INDEX}: cannot be read ({type(error).__name__})") from None
    return files


def rows(stored: StoredTensor, start: int, number: int) -> Tensor:
    """`number` rows of a tensor from `start` on, [number, ...]; no other bytes are read. Raises ValueError."""
    each = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    raw = torch.empty(number * each, dtype=torch.uint8)
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.begin + start * each)
        at, view = 0, memoryview(raw.numpy())  # type: ignore[arg-type]
        while at < len(view):
            got = file.readinto(view[at:])
            if not got:
                raise ValueError(f"{stored.file.name}: is cut short")
            at += got
    return raw.view(stored.dtype).view(number, *stored.shape[1:])


def write(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], values: Iterator[Tensor]) -> None:
    """One file, on the disk when this returns: of each tensor its shape and dtype, then the tensors in that order."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        head[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (shape, dtype)), value in zip(tensors.items(), values, strict=True):
            assert tuple(value.shape) == shape, name
            file.write(value.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def shards(sizes: Mapping[str, int], longest: int) -> list[list[str]]:
    """The tensors in their order, as many to a file as `longest` bytes hold, at least one."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = longest
        shards[-1].append(name)
        room -= size
    return shards
