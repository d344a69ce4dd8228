"""Parts put together into a store's files, in their order, with what has been put there journalled.

A merge that was cut short goes on from its journal: files are cut back to the lengths that it names, and parts that it
does not name are still there. Files are on the disk before the journal names them.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data import reading
from data.stores.checks import BlockChecksums
from data.stores.indexed import BLOCK, write_index

JOURNAL = "journal.json"
JOURNAL_S = 5.0  # between two entries: each waits for the disk
_HEADER = 128  # bytes of a one-dimensional .npy file's header, whatever its length


class Column:
    """A one-dimensional .npy file that grows; `close` writes the header that makes it one."""

    def __init__(self, path: Path, dtype: str, count: int) -> None:
        self.dtype = np.dtype(dtype)
        self.stream = _reopened(path, _HEADER + count * self.dtype.itemsize)
        self.count = count

    def append(self, values: NDArray[Any]) -> None:
        self.stream.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.count += len(values)

    def close(self) -> None:
        self.stream.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self.stream, header)
        assert self.stream.tell() == _HEADER
        self.stream.close()


class Merge:
    """The files of a store in `folder`, from the parts in `parts` up to the last that the journal names.

    tokens: the file of the tokens, where it lies elsewhere already; null to write it. `facts`: what is counted, by
    name; `parts` among that.
    """

    def __init__(self, folder: Path, parts: Path, dtype: np.dtype, tokens: Path | None = None) -> None:
        self.folder = folder
        self.parts = parts
        self.dtype = dtype
        self.elsewhere = tokens
        self.facts: dict[str, Any] = {"parts": 0, "documents": 0, "tokens": 0, "bytes": 0, "names": 0, "named": 0}
        self.facts |= {"largest": -1, "skipped": {}, "last": None, "unknown": 0}
        if (journal := folder / JOURNAL).exists():
            self.facts |= reading.json_object(journal)
        count = self.facts["documents"]
        self.offsets = Column(folder / "offsets.npy", "<i8", count + 1 if count else 0)
        if not count:
            self.offsets.append(np.zeros(1))
        self.hashes = Column(folder / "hashes.npy", "<u8", count)
        self.sources = Column(folder / "sources.npy", "<u4", count)
        self.names = _reopened(folder / "sources.txt", self.facts["named"])
        written = 0 if tokens else self.facts["tokens"] * dtype.itemsize
        self.tokens = None if tokens else _reopened(folder / "tokens.bin", written)
        self.digest, self.sums = hashlib.sha256(), BlockChecksums()
        if written:
            self._read(folder / "tokens.bin", written)
        self._journaled = time.monotonic()
        self._merged: list[int] = []

    def append(self, number: int, part: dict[str, Any]) -> None:
        """Puts the next part behind the others."""
        documents, facts = part["documents"], self.facts
        self.offsets.append(facts["tokens"] + np.cumsum(documents["length"]))
        self.hashes.append(documents["hash"])
        again = bool(part["names"]) and part["names"][0] == facts["last"]  # a file may go on from part to part
        self.sources.append(documents["source"] + (facts["names"] - again))
        for name in part["names"][again:]:
            line = " ".join(name.split("\n")).encode("utf-8", "replace") + b"\n"
            facts["named"] += self.names.write(line)
        facts["names"] += len(part["names"]) - again
        facts["last"] = part["names"][-1] if part["names"] else facts["last"]
        if self.tokens is not None:
            with open(self.parts / f"{number:06}.bin", "rb") as stream:
                while block := stream.read(1 << 20):
                    self.digest.update(block)
                    self.sums.update(block)
                    self.tokens.write(block)
        facts["documents"] += len(documents)
        facts["tokens"] += int(documents["length"].sum())
        facts["bytes"] += part["bytes"]
        facts["unknown"] += part.get("unknown", 0)
        facts["largest"] = max(facts["largest"], part["largest"])
        for reason, times in part["skipped"].items():
            facts["skipped"][reason] = facts["skipped"].get(reason, 0) + times
        facts["parts"] = number + 1
        self._merged.append(number)
        if time.monotonic() - self._journaled > JOURNAL_S:
            self.journal()

    def journal(self) -> None:
        """Makes what has been put together the place to go on from, and drops its parts."""
        for stream in self._streams():
            stream.flush()
            os.fsync(stream.fileno())
        aside = self.folder / f"{JOURNAL}.partial"
        with open(aside, "w") as entry:
            json.dump(self.facts, entry)
            entry.flush()
            os.fsync(entry.fileno())
        aside.replace(self.folder / JOURNAL)
        for number in self._merged:
            for kind in ("json", "npy", "bin"):
                (self.parts / f"{number:06}.{kind}").unlink(missing_ok=True)
        self._merged = []
        self._journaled = time.monotonic()

    def finish(self) -> str:
        """Completes the files, and returns the fingerprint: sha256 (hex) of the tokens, then of the offsets."""
        for column in (self.offsets, self.hashes, self.sources):
            column.close()
        self.names.close()
        if self.tokens is not None:
            self.tokens.close()
        if self.elsewhere is not None:
            self._read(self.elsewhere, self.elsewhere.stat().st_size)
        offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
        for begin in range(0, len(offsets), BLOCK):
            self.digest.update(np.ascontiguousarray(offsets[begin : begin + BLOCK]).data)
        if self.elsewhere is None:
            write_index(self.folder / "tokens.idx", offsets, self.dtype)
        return self.digest.hexdigest()

    def close(self) -> None:
        """Lets go of the files as they are: the journal says where to go on."""
        for stream in self._streams():
            with suppress(OSError):  # a full disk's, which has been told already
                stream.close()

    def _streams(self) -> list[IO[bytes]]:
        own = [column.stream for column in (self.offsets, self.hashes, self.sources)]
        return [*own, self.names, *([self.tokens] if self.tokens is not None else [])]

    def _read(self, path: Path, size: int) -> None:
        with open(path, "rb") as stream:
            while size and (block := stream.read(min(1 << 20, size))):
                self.digest.update(block)
                self.sums.update(block)
                size -= len(block)


def _reopened(path: Path, size: int) -> IO[bytes]:
    """A file of which the first `size` bytes are kept. Raises ValueError where it has fewer, but for a header."""
    if path.is_symlink() or not path.is_file():  # it would be written through, or waited for
        path.unlink(missing_ok=True)
    stream = open(path, "r+b" if path.exists() else "w+b")
    if stream.seek(0, os.SEEK_END) < size and size != _HEADER:
        stream.close()
        raise ValueError(f"{path} is shorter than the journal says")
    stream.truncate(size)
    stream.seek(size)
    return stream
