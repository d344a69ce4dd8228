"""Indices over a store: which sequences there are, in files that are mapped and never read whole.

An index is a folder of int64 arrays beside its store, in `STORE.index/`, or in the user's cache where that cannot be
written. Its name is a hash of the store's content and of everything that decides the index, so it is never out of date;
it is written aside, synced and renamed, so it is complete or absent; and whoever builds it builds the same bytes.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data import reading

CHECKED_BYTES = 64 << 20  # of an array, at every opening: some 50 ms
BLOCK = 1 << 16  # documents, or other rows, that are looked at together
Ints = NDArray[np.int64]


class StoredDocuments(Protocol):
    """The part of a store that an index and a sampler use: document i is tokens[offsets[i]:offsets[i + 1]].

    opened: whether every document opens with the token that closes the one before; where not, nothing predicts what
    follows one.
    """

    folder: Path
    fingerprint: str
    opened: bool

    @property
    def tokens(self) -> NDArray[Any]: ...
    @property
    def offsets(self) -> Ints: ...
    @property
    def hashes(self) -> NDArray[np.uint64]: ...


class IndexWriter:
    """Arrays that grow on disk, int64, by their names; and `facts`, small numbers to keep beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self._files: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self._sums: dict[str, int] = {}

    def append(self, name: str, values: Any) -> None:
        if name not in self._files:
            self._files[name] = open(self.folder / f"{name}.bin", "wb")
            self.counts[name] = 0
        values = np.ascontiguousarray(values, dtype="<i8")
        self._files[name].write(values.data)
        self._sums[name] = zlib.crc32(values.data, self._sums.get(name, 0))
        self.counts[name] += values.size

    def close(self) -> None:
        card = {"counts": self.counts, "facts": self.facts, "crc32": self._sums}
        (self.folder / "index.json").write_text(json.dumps(card, indent=1) + "\n")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


class SamplerIndex:
    """An index on disk: `index["name"]` is an array int64, mapped; empty for a name that has none. `facts` as written.

    Raises ValueError if its files are not what its card says: in size, and, up to `CHECKED_BYTES` of each, in content.
    """

    def __init__(self, folder: Path) -> None:
        card = reading.json_object(folder / "index.json")
        self.folder, self.facts = folder, dict(card["facts"])
        self._arrays: dict[str, Ints] = {}
        for name, count in card["counts"].items():
            path = folder / f"{name}.bin"
            if path.parent != folder or not S_ISREG(path.stat().st_mode):
                raise ValueError(f"{path}: must be a regular file of the index")
            if path.stat().st_size != 8 * count:
                raise ValueError(f"{path}: must have {8 * count:,} bytes")
            self._arrays[name] = np.memmap(path, dtype="<i8", mode="r") if count else np.empty(0, np.int64)
            known = card.get("crc32", {}).get(name)  # an index from before there were any has none
            if known is not None and 8 * count <= CHECKED_BYTES and zlib.crc32(self._arrays[name].data) != known:
                raise ValueError(f"{path}: is damaged")

    def __getitem__(self, name: str) -> Ints:
        return self._arrays.get(name, _EMPTY)


_EMPTY = np.empty(0, np.int64)
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # or there is none


def index(store: StoredDocuments, spec: dict[str, Any], write: Callable[[IndexWriter], None]) -> SamplerIndex:
    """The index of a store under `spec`, which says all that decides it: the one that is there, or what `write` makes.

    Raises OSError where neither place can be written.
    """
    name = hashlib.sha256(json.dumps([store.fingerprint, spec], sort_keys=True).encode()).hexdigest()[:16]
    places = list(_places(store.folder))
    for place in places:
        with suppress(*_DAMAGED):
            return SamplerIndex(place / name)
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            if not os.access(place, os.W_OK):
                continue
        except OSError:
            continue
        return _build(place, name, write)
    raise PermissionError(f"data.store={store.folder}: neither {places[0]} nor the cache can be written to")


def _places(folder: Path) -> Iterator[Path]:
    folder = Path(folder).absolute()
    yield folder.with_name(f"{folder.name}.index")
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farspan" / "index"


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One builder at a time, where the file system has locks."""
    with open(lock, "w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(place: Path, name: str, write: Callable[[IndexWriter], None]) -> SamplerIndex:
    with _alone(place / f".{name}.lock"), tempfile.TemporaryDirectory(prefix=f".{name}-", dir=place) as aside:
        with suppress(*_DAMAGED):
            return SamplerIndex(place / name)  # built by another process while this one waited
        new = Path(aside, "new")
        new.mkdir()
        writer = IndexWriter(new)
        write(writer)
        writer.close()
        try:
            new.rename(place / name)
        except OSError:  # a rival's where locks fail, whose bytes are the same, or a damaged one
            with suppress(*_DAMAGED):
                return SamplerIndex(place / name)
            shutil.rmtree(place / name, ignore_errors=True)
            new.rename(place / name)
    return SamplerIndex(place / name)
