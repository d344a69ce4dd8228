"""Corpora: where documents come from. `CORPORA` names them for `data=<name>`."""

import codecs
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

from data.corpora.files import (
    HEAD,
    CorpusPart,
    CorpusReader,
    files,
    grouped,
    guarded,
    is_text,
    is_there,
    left_out_note,
    listing,
    named,
    opens_as_text,
)
from data.corpora.generated import Copies, Needles
from data.corpora.hub import HuggingFace
from data.corpora.installed import Headers, Stdlib
from data.corpora.megatron import Megatron
from data.corpora.records import Jsonl, Parquet

__all__ = ["CORPORA", "HEAD", "Copies", "Corpus", "Headers", "Needles", "Stdlib", "Text"]


class Corpus(Protocol):
    """Named documents, in an order that depends on their names alone, read in parts."""

    name: str

    def check(self) -> None:
        """Raises ValueError, one line that opens with the key at fault, if there is nothing to read. Quick."""

    def identity(self) -> dict[str, str | int]:
        """Facts that differ between this source and another, or itself after a change, found without reading it."""

    def parts(self) -> Iterator[CorpusPart]:
        """Pieces that can be read by themselves, in the order of the documents; the same for the same identity."""

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """(name of its source, content) of the part's documents; those left out are counted by reason."""

    def left_out(self) -> dict[str, int]:
        """Counts files beside the documents that are not read, by reason."""

    def nothing(self) -> ValueError:
        """Makes the error to raise where no part has a document."""

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """(name of its source, content) of every document."""


class Text(CorpusReader):
    """A file, or a folder's files at any depth in the order of their relative paths: one document each.

    Hidden files and folders are skipped, linked folders and those that farspan has written, and so is a file that is
    empty, is not UTF-8 or holds a NUL byte; all are counted. A byte-order mark is no part of a text.
    """

    name = "text"

    def __init__(self, *, path: str | None = None) -> None:
        self.path = path
        self.root = Path(path or "").expanduser()

    def check(self) -> None:
        """Raises ValueError if the path is missing, or if no file opens as text. Stops at the first that does."""
        if not self.path:
            raise ValueError("data.path=null: corpus text needs a file or a folder")
        if not is_there("data.path", self.root):
            raise ValueError(f"data.path={self.path}: no such file or folder")
        if not any(guarded(map(opens_as_text, self._walk()), f"data.path={self.path}: cannot be read")):
            raise self.nothing()

    def identity(self) -> dict[str, str | int]:
        """The resolved path, number and total size of the files, and a digest of their names, sizes and mtimes."""
        return {"corpus": self.name, "path": str(self.root.resolve()), **listing(named(self.root, self._walk()))}

    def parts(self) -> Iterator[CorpusPart]:
        """Whole files, some to a part."""
        return grouped(named(self.root, self._walk()))

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """(path relative to the folder, content) of every file that is text and not empty."""
        for name, file in part.what:
            (content,) = guarded(map(Path.read_bytes, [Path(file)]), f"data.path={self.path}: {name} cannot be read")
            content = content.removeprefix(codecs.BOM_UTF8)
            if not content:
                skipped["empty"] += 1
            elif not is_text(content, final=True):
                skipped["not text"] += 1
            else:
                yield name, content

    def left_out(self) -> dict[str, int]:
        """Counts files that a walk skips, by reason; `read` counts files that are no text."""
        left: Counter[str] = Counter()
        for _ in self._walk(left):
            pass
        return dict(+left)

    def nothing(self) -> ValueError:
        return ValueError(f"data.path={self.path}: holds no text; expected UTF-8 files{left_out_note(self.left_out())}")

    def _walk(self, left: Counter[str] | None = None) -> Iterator[Path]:
        return iter([self.root]) if self.root.is_file() else files(self.root, left=left)


class Prepared(CorpusReader):
    """No source at all: the store of `data.store`, as `farspan prepare` has made it, here or elsewhere."""

    name = "store"

    def __init__(self, *, path: str | None = None) -> None:
        self.path = path

    def check(self) -> None:
        """Raises ValueError if a path is given."""
        if self.path is not None:
            raise ValueError(f"data.path={self.path}: corpus store takes no path; data.store says where it is")

    def identity(self) -> dict[str, str | int]:
        """Nothing: its card says what it was made of."""
        return {"corpus": self.name}


CorpusName = Literal["stdlib", "text", "jsonl", "parquet", "hf", "megatron", "store", "headers", "needles", "copies"]
CORPORA = {
    "stdlib": Stdlib,
    "text": Text,
    "jsonl": Jsonl,
    "parquet": Parquet,
    "hf": HuggingFace,
    "megatron": Megatron,
    "store": Prepared,
    "headers": Headers,
    "needles": Needles,
    "copies": Copies,
}
