"""Files of a corpus: which there are, what tells them from others, and whether they are text."""

import codecs
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HEAD = 1 << 16  # bytes of a file that `check` looks at before it calls it text
PART_BYTES = 8 << 20  # of a corpus, read by one process at a time
ON_ERROR = ("stop", "skip")


class Part(NamedTuple):
    """A piece of a corpus that can be read by itself: `what` its corpus makes of it, and its size in bytes, about."""

    what: Any
    size: int


class Reader:
    """What corpora share: they are read in parts that depend on the corpus alone, never on who reads them."""

    name = ""

    def parts(self) -> Iterator[Part]:
        """In the order of the documents."""
        raise NotImplementedError

    def read(self, part: Part, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the part's documents; those that are left out are counted by reason in `skipped`."""
        raise NotImplementedError

    def nothing(self) -> ValueError:
        """What to raise where no part has a document."""
        return ValueError(f"data.corpus={self.name}: holds no documents")

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """(name, content) of every document, from the first part to the last. Raises ValueError if there is none."""
        empty = True
        for part in self.parts():
            for document in self.read(part, Counter()):
                empty = False
                yield document
        if empty:
            raise self.nothing()


def files(root: Path, outside: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files below `root` that are not hidden, skipping the folders named in `outside`."""
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if name not in outside and not name.startswith("."))
        found = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (file for file in found if file.is_file())


def _raise(error: OSError) -> None:
    raise error  # os.walk would drop an unreadable folder without a word


def named(root: Path, found: Iterator[Path]) -> list[tuple[str, Path]]:
    """(path relative to the root, file), sorted by that."""
    return sorted((file.name if file == root else file.relative_to(root).as_posix(), file) for file in found)


def listing(found: Sequence[tuple[str, Path]]) -> dict[str, str | int]:
    """Number and total size of files, and a digest of their names, sizes and mtimes."""
    told = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in ((name, file.stat()) for name, file in found)]
    return {
        "files": len(told),
        "bytes": sum(size for _, size, _ in told),
        "digest": hashlib.sha256(repr(told).encode()).hexdigest(),
    }


def grouped(found: Sequence[tuple[str, Path]]) -> Iterator[Part]:
    """Whole files, in their order, some to a part."""
    group: list[tuple[str, str]] = []
    size = 0
    for name, file in found:
        group.append((name, str(file)))
        size += file.stat().st_size
        if size >= PART_BYTES:
            yield Part(group, size)
            group, size = [], 0
    if group:
        yield Part(group, size)


def hashed(content: bytes) -> int:
    """The 64 bits that a document is known by: as a fraction of 2^64 they say whether it is held out."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def opens_as_text(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    return bool(head) and is_text(head, final=len(head) < HEAD)


def is_text(content: bytes, final: bool) -> bool:
    """Whether bytes are UTF-8 without NUL; if not `final`, the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content, final)
    except UnicodeDecodeError:
        return False
    return b"\0" not in content
