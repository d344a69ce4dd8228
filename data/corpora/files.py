"""Files of a corpus: which there are, what tells them from others, and whether they are text."""

import codecs
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from data.corpora.outputs import is_cache, is_output

T = TypeVar("T")
HEAD = 1 << 16  # bytes of a file that `check` looks at before it calls it text
PART_BYTES = 8 << 20  # of a corpus, read by one process at a time
OnError = Literal["stop", "skip"]
ON_ERROR = get_args(OnError)
KINDS = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"))

# Reasons why a walk leaves files out; a card and a run's first lines print them behind the number.
LINKED, HIDDEN, OURS = "linked folders", "hidden files or folders", "folders of runs, stores, models or caches"
NO_FILE, OTHER, EMPTY = "links to nothing, devices or pipes", "files with another suffix", "empty"
BESIDE = frozenset({LINKED, HIDDEN, OURS, NO_FILE, OTHER})  # may change while the documents do not


class CorpusPart(NamedTuple):
    """A piece of a corpus that can be read by itself: `what` its corpus makes of it, and its size in bytes, about."""

    what: Any
    size: int


class CorpusReader:
    """Base class of corpora, which are read in parts that depend on the corpus alone, never on who reads them."""

    name = ""

    def parts(self) -> Iterator[CorpusPart]:
        """In the order of the documents."""
        raise NotImplementedError

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the part's documents; those that are left out are counted by reason in `skipped`."""
        raise NotImplementedError

    def left_out(self) -> dict[str, int]:
        """Counts files beside the documents that are not read, by reason; `read` counts its own on top."""
        return {}

    def nothing(self) -> ValueError:
        """Makes the error to raise where no part has a document."""
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


def files(root: Path, outside: frozenset[str] = frozenset(), left: Counter[str] | None = None) -> Iterator[Path]:
    """Regular files below `root` that are not hidden, skipping the folders named in `outside`, linked ones, and those
    that farspan has written (`data.corpora.outputs`). left: counts what is skipped, by reason, but for `outside`.

    Raises ValueError for a folder that cannot be read.
    """
    left = Counter() if left is None else left

    def stop(error: OSError) -> None:  # os.walk would drop the folder without a word
        raise ValueError(f"data.path={root}: {error.filename} cannot be read ({error.strerror})")

    for folder, folders, names in os.walk(root, onerror=stop):
        entries = [*folders, *names]
        if is_output(Path(folder), entries) or folder != str(root) and is_cache(folder, entries):
            left[OURS] += 1
            folders[:] = []
            continue
        inner = [name for name in folders if name not in outside]
        shown = sorted(name for name in inner if not name.startswith("."))
        left[LINKED] += sum(os.path.islink(os.path.join(folder, name)) for name in shown)
        folders[:] = shown
        readable = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        left[HIDDEN] += len(inner) - len(shown) + len(names) - len(readable)
        for file in readable:
            if file.is_file():
                yield file
            else:
                left[NO_FILE] += 1


def is_there(key: str, path: Path) -> bool:
    """True where a regular file or a folder is there. Raises ValueError, one line that opens with the key, for anything
    else, which may have no end, and for a name that no file system takes."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it holds a NUL"
        raise ValueError(f"{key}={_short(path)}: cannot be looked up ({why})") from None
    for is_kind, kind in KINDS:
        if is_kind(mode):
            raise ValueError(f"{key}={path}: is a {kind}; must be a regular file or a folder")
    return True


def left_out_note(left: dict[str, int]) -> str:
    """Formats the counts as the end of a line; empty where nothing was left out."""
    return f" (left out: {counted(left)})" if left else ""


def counted(left: dict[str, int]) -> str:
    """Numbers, each with what it is of."""
    return ", ".join(f"{count:,} {reason}" for reason, count in left.items())


def _short(path: Path) -> str:
    text = str(path).replace("\0", "?")
    return text if len(text) <= 200 else f"{text[:200]}…"


def guarded(values: Iterable[T], problem: str) -> Iterator[T]:
    """Yields the values. An error in reading them becomes a ValueError of one line, `problem` and the
    reason: every container has errors of its own, and a file that cannot be opened is among them."""
    try:
        yield from values
    except Exception as error:
        why = str(error)
        if isinstance(error, OSError) and error.strerror:
            why = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise ValueError(f"{problem} ({' '.join(why.split())[:200] or type(error).__name__})") from None


def named(root: Path, paths: Iterator[Path]) -> list[tuple[str, Path]]:
    """(path relative to the root, file), sorted by that."""
    return sorted((file.name if file == root else file.relative_to(root).as_posix(), file) for file in paths)


def listing(paths: Sequence[tuple[str, Path]]) -> dict[str, str | int]:
    """Number and total size of files, and a digest of their names, sizes and mtimes."""
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in ((name, file.stat()) for name, file in paths)]
    return {
        "files": len(stats),
        "bytes": sum(size for _, size, _ in stats),
        "digest": hashlib.sha256(repr(stats).encode()).hexdigest(),
    }


def grouped(paths: Sequence[tuple[str, Path]]) -> Iterator[CorpusPart]:
    """Whole files, in their order, some to a part."""
    group: list[tuple[str, str]] = []
    size = 0
    for name, file in paths:
        group.append((name, str(file)))
        size += file.stat().st_size
        if size >= PART_BYTES:
            yield CorpusPart(group, size)
            group, size = [], 0
    if group:
        yield CorpusPart(group, size)


def hashed(content: bytes) -> int:
    """The 64 bits that a document is known by: as a fraction of 2^64 they say whether it is held out."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def opens_as_text(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    return bool(head) and is_text(head, final=len(head) < HEAD)


def is_text(content: bytes, final: bool) -> bool:
    """True for bytes that are UTF-8 without NUL; if not `final`, the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content, final)
    except UnicodeDecodeError:
        return False
    return b"\0" not in content
