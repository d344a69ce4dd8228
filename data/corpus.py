"""Corpora: where documents come from. `CORPORA` names them for `data=<name>`."""

import codecs
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

HEAD = 1 << 16  # bytes of a file that `check` looks at before it calls it text


class Corpus(Protocol):
    """Named documents, in an order that depends on their names alone. `path` is `data.path`, None if unset."""

    name: str

    def __init__(self, *, path: str | None = None) -> None: ...

    def check(self) -> None:
        """Raises ValueError, one line that opens with the key at fault, if there is nothing to read. Quick."""

    def identity(self) -> dict[str, str | int]:
        """What tells this source from another, and from itself after a change, without reading it."""

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """(name, content) of every document that is not empty."""


class Stdlib:
    """The source of Python's own standard library: one document per `*.py`, in the order of their relative paths."""

    name = "stdlib"
    outside = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})

    def __init__(self, *, path: str | None = None) -> None:
        self.path = path
        self.root = Path(sysconfig.get_path("stdlib"))

    def check(self) -> None:
        """Raises ValueError if a path is given, or if this Python has no source on disk."""
        if self.path is not None:
            raise ValueError(f"data.path={self.path}: corpus stdlib takes no path; data=text does")
        if next(self._walk(), None) is None:
            raise ValueError("data.corpus=stdlib: this Python comes without its source; use data=text with data.path")

    def identity(self) -> dict[str, str | int]:
        """Python's version, and the number, total size and newest mtime (ns) of the files."""
        stats = [file.stat() for file in self._walk()]
        return {
            "corpus": self.name,
            "python": platform.python_version(),
            "files": len(stats),
            "bytes": sum(stat.st_size for stat in stats),
            "newest": max((stat.st_mtime_ns for stat in stats), default=0),
        }

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """(path relative to the library, source) of every file that is not empty."""
        yield from _documents(self.root, self._walk())

    def _walk(self) -> Iterator[Path]:
        return (file for file in _files(self.root, self.outside) if file.suffix == ".py")


class Text:
    """A file, or a folder's files at any depth in the order of their relative paths: one document each.

    Hidden files and folders are skipped, and so is a file that is not UTF-8 or holds a NUL byte.
    """

    name = "text"

    def __init__(self, *, path: str | None = None) -> None:
        self.path = path
        self.root = Path(path or "").expanduser()

    def check(self) -> None:
        """Raises ValueError if the path is missing, or if no file opens as text. Stops at the first that does."""
        if not self.path:
            raise ValueError("data.path=null: corpus text needs a file or a folder")
        if not self.root.exists():
            raise ValueError(f"data.path={self.path}: no such file or folder")
        if not any(map(_opens_as_text, self._walk())):
            raise self._no_text()

    def identity(self) -> dict[str, str | int]:
        """The resolved path, number and total size of the files, and a digest of their names, sizes and mtimes."""
        stats = [(name, file.stat()) for name, file in _sorted(self.root, self._walk())]
        listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return {
            "corpus": self.name,
            "path": str(self.root.resolve()),
            "files": len(listing),
            "bytes": sum(size for _, size, _ in listing),
            "digest": hashlib.sha256(repr(listing).encode()).hexdigest(),
        }

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """(path relative to the folder, content) of every file that is text and not empty; ValueError if none is."""
        empty = True
        for name, content in _documents(self.root, self._walk()):
            if _is_text(content, final=True):
                empty = False
                yield name, content
        if empty:
            raise self._no_text()

    def _walk(self) -> Iterator[Path]:
        return iter([self.root]) if self.root.is_file() else _files(self.root)

    def _no_text(self) -> ValueError:
        return ValueError(f"data.path={self.path}: holds no text; expected UTF-8 files")


CORPORA: dict[str, type[Corpus]] = {"stdlib": Stdlib, "text": Text}


def _files(root: Path, outside: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files below `root` that are not hidden, skipping the folders named in `outside`."""
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if name not in outside and not name.startswith("."))
        files = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _raise(error: OSError) -> None:
    raise error  # os.walk would drop an unreadable folder without a word


def _sorted(root: Path, files: Iterator[Path]) -> list[tuple[str, Path]]:
    return sorted((file.name if file == root else file.relative_to(root).as_posix(), file) for file in files)


def _documents(root: Path, files: Iterator[Path]) -> Iterator[tuple[str, bytes]]:
    for name, file in _sorted(root, files):
        if content := file.read_bytes():
            yield name, content


def _opens_as_text(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    return bool(head) and _is_text(head, final=len(head) < HEAD)


def _is_text(content: bytes, final: bool) -> bool:
    """Whether bytes are UTF-8 without NUL; if not `final`, the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content, final)
    except UnicodeDecodeError:
        return False
    return b"\0" not in content
