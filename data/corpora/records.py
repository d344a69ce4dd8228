"""Corpora of records: JSON lines and Parquet, one document a record, its text under one field."""

import bz2
import codecs
import glob
import gzip
import io
import itertools
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.corpora.files import (
    EMPTY,
    NO_FILE,
    ON_ERROR,
    OTHER,
    OURS,
    PART_BYTES,
    CorpusPart,
    CorpusReader,
    files,
    guarded,
    is_there,
    left_out_note,
    listing,
    named,
)
from data.corpora.outputs import is_inside

ROWS = 256  # read at a time
TOO_LONG = "a number has too many digits"
LINE_BYTES = 1 << 30  # of one record: a packed file of a megabyte may hold a line of any length


def _zstd(file: str, mode: str) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"), 1 << 16)


UNPACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


class Records(CorpusReader):
    """A file, a folder or a pattern of files of records. What is wrong with one ends the reading with a line that
    says where, or, `on_error="skip"`, leaves it out and counts it."""

    suffixes: tuple[str, ...] = ()
    expected = ""  # those, in words

    def __init__(self, *, path: str | None = None, field: str = "text", on_error: str = "stop") -> None:
        self.path = path
        self.field = field
        self.on_error = on_error

    def check(self) -> None:
        """Raises ValueError if the path is missing, holds no such files, or `on_error` is not known."""
        if self.on_error not in ON_ERROR:
            raise ValueError(f"data.on_error={self.on_error}: must be one of {', '.join(ON_ERROR)}")
        if not self.path:
            raise ValueError(f"data.path=null: corpus {self.name} needs a file, a folder or a pattern")
        root = Path(self.path).expanduser()
        if not (glob.has_magic(str(root)) or is_there("data.path", root)) or not self._files():
            raise self.nothing()

    def identity(self) -> dict[str, str | int]:
        """The path, the field, number and total size of the files, a digest of their names, sizes and mtimes."""
        path = str(Path(self.path or "").expanduser().absolute())
        identity: dict[str, str | int] = {"corpus": self.name, "path": path, "field": self.field}
        return {**identity, "on_error": self.on_error, **listing(self._files())}

    def left_out(self) -> dict[str, int]:
        """Files that are no such records, and what a walk skips, by reason."""
        left: Counter[str] = Counter()
        files = self._files(left)
        left[EMPTY] += sum(file.stat().st_size == 0 for _, file in files)
        return dict(+left)

    def nothing(self) -> ValueError:
        root = Path(self.path or "").expanduser()
        if not glob.has_magic(str(root)) and not root.exists():
            return ValueError(f"data.path={self.path}: no such file or folder")
        expected = f"expected files {self.expected}{left_out_note(self.left_out())}"
        return ValueError(f"data.path={self.path}: holds no documents; {expected}")

    def _files(self, left: Counter[str] | None = None) -> list[tuple[str, Path]]:
        root, left = Path(self.path or "").expanduser(), Counter() if left is None else left
        if glob.has_magic(str(root)) and not root.exists():
            return self._matching(root, left)
        if root.is_file():
            return [(root.name, root)]
        every = list(files(root, left=left))
        matching = [file for file in every if file.name.lower().endswith(self.suffixes)]
        left[OTHER] += len(every) - len(matching)
        return named(root, iter(matching))

    def _matching(self, pattern: Path, left: Counter[str]) -> list[tuple[str, Path]]:
        """The files of a pattern but for those in folders that farspan has written. A folder that matches is none."""
        plain = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
        matched = [Path(file) for file in sorted(glob.glob(str(pattern), recursive=True))]
        files = [file for file in matched if file.is_file()]
        left[NO_FILE] += sum(not file.is_dir() for file in matched) - len(files)
        outside = [file for file in files if not is_inside(file, Path(*plain))]
        left[OURS] += len(files) - len(outside)
        return [(str(file), file) for file in outside]

    def _text(self, value: Any, where: Callable[[], str], skipped: Counter[str]) -> bytes | None:
        """The UTF-8 bytes of a field's value, None where it is left out."""
        if isinstance(value, str):
            try:
                value = value.encode()
            except UnicodeEncodeError:
                return self._bad("not UTF-8", "has half a character (a lone surrogate)", where, skipped)
        if not isinstance(value, bytes):
            return self._bad("no text", f"has no text under data.field={self.field}", where, skipped)
        if not value:
            return self._bad("empty", "is an empty document", where, skipped)
        return value

    def _bad(self, reason: str, problem: str, where: Callable[[], str], skipped: Counter[str]) -> bytes | None:
        """None, where it is left out."""
        if self.on_error == "stop":
            raise ValueError(f"data.path={self.path}: {where()} {problem}; data.on_error=skip leaves such out")
        skipped[reason] += 1
        return None


class Jsonl(Records):
    """JSON lines, plain or packed (.gz, .bz2, .xz, .zst); a plain file is read in parts, a packed one as a whole.

    Suffixes are of any case. A byte-order mark is no part of a line.
    """

    name = "jsonl"
    suffixes = tuple(f"{end}{how}" for how in ("", *UNPACKED) for end in (".jsonl", ".ndjson", ".json"))
    expected = f".jsonl, .ndjson, .json, or one of them packed: {', '.join(UNPACKED)}"

    def check(self) -> None:
        """Raises ValueError too where a file is packed by zstd and pyarrow, which reads it, is missing."""
        super().check()
        packed = next((name for name, _ in self._files() if name.lower().endswith(".zst")), None)
        if packed is not None and find_spec("pyarrow") is None:
            raise ValueError(f"data.path={self.path}: {packed} needs pyarrow, which is not installed")

    def parts(self) -> Iterator[CorpusPart]:
        """Stretches of bytes of a file; a line belongs to the one that it begins in."""
        for name, file in self._files():
            size = file.stat().st_size
            step = max(size, 1) if file.suffix.lower() in UNPACKED else PART_BYTES
            for begin in range(0, size, step):
                yield CorpusPart((name, str(file), begin, min(begin + step, size)), min(step, size - begin))

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """(name of the file, text) of every line; lines of blanks are none. Raises ValueError for a bad one."""
        name, file, begin, end = part.what
        damaged = f"data.path={self.path}: {name} cannot be read: it is cut short, damaged, or no such file"
        for number, line in enumerate(guarded(_lines(file, begin, end), damaged)):

            def where(number: int = number) -> str:
                return f"{name} line {_before(file, begin) + number + 1}"

            if len(line) > LINE_BYTES:
                raise ValueError(f"data.path={self.path}: {where()} has more than {LINE_BYTES:,} bytes")
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode().rstrip("\r\n"))
            except UnicodeDecodeError:
                self._bad("not UTF-8", "is not UTF-8", where, skipped)
                continue
            except (ValueError, RecursionError) as error:  # a plain ValueError: of a number with too many digits
                why = f" ({error.msg} at column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
                why = why or " (it is nested too deep)" * isinstance(error, RecursionError) or f" ({TOO_LONG})"
                self._bad("not JSON", f"is not JSON{why}", where, skipped)
                continue
            value = record.get(self.field) if isinstance(record, dict) else None
            if (content := self._text(value, where, skipped)) is not None:
                yield name, content


def _lines(file: str, begin: int, end: int) -> Iterator[bytes]:
    """The lines that begin in a stretch of a file, and its last may end behind it; of a packed file, all."""
    unpack = UNPACKED.get(Path(file).suffix.lower())
    if unpack is not None:
        with unpack(file, "rb") as stream:
            while line := stream.readline(LINE_BYTES + 1):
                yield line
        return
    with open(file, "rb") as stream:
        place = begin
        if begin:
            stream.seek(begin - 1)
            place += len(stream.readline()) - 1
        while place < end and (line := stream.readline(LINE_BYTES + 1)):
            place += len(line)
            yield line


def _before(file: str, begin: int) -> int:
    """Counts the lines before a stretch; called only when an error names a line."""
    count, place = 0, 0
    if begin:
        with open(file, "rb") as stream:
            while place < begin and (block := stream.read(min(1 << 20, begin - place))):
                count += block.count(b"\n")
                place += len(block)
            stream.seek(begin - 1)
            count += stream.read(1) != b"\n"  # the line that runs into the stretch
    return count


class Parquet(Records):
    """Parquet files, read by row groups."""

    name = "parquet"
    suffixes = (".parquet", ".pq")
    expected = ".parquet, .pq"

    def check(self) -> None:
        """Raises ValueError too where a file is none, or has no such field."""
        super().check()
        for name, file in self._files():
            fields = _opened(self.path, name, file).schema_arrow
            if (times := fields.names.count(self.field)) != 1:
                has = "no such column" if not times else f"{times} columns of that name"
                raise ValueError(f"data.field={self.field}: {name} has {has}; it has {', '.join(fields.names)}")
            kind = str(fields.field(self.field).type)
            if not kind.endswith(("string", "binary", "string_view", "binary_view")):
                raise ValueError(f"data.field={self.field}: must be text, {name} has {kind} there")

    def parts(self) -> Iterator[CorpusPart]:
        """Row groups, some to a part."""
        for name, file in self._files():
            facts = _opened(self.path, name, file).metadata
            first, size = 0, 0
            for group in range(facts.num_row_groups):
                size += facts.row_group(group).total_byte_size
                if size >= PART_BYTES or group + 1 == facts.num_row_groups:
                    yield CorpusPart((name, str(file), first, group + 1), size)
                    first, size = group + 1, 0

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """(name of the file, text) of every row."""
        import pyarrow as pa

        name, file, first, end = part.what
        opened = _opened(self.path, name, Path(file))
        row = sum(opened.metadata.row_group(group).num_rows for group in range(first))
        batches = opened.iter_batches(batch_size=ROWS, row_groups=list(range(first, end)), columns=[self.field])
        values = (batch.column(0).cast(pa.large_binary()).to_pylist() for batch in batches)
        for rows in guarded(values, f"data.path={self.path}: {name} is damaged"):
            for value in rows:

                def where(row: int = row) -> str:
                    return f"{name} row {row}"

                row += 1
                content = self._text(value, where, skipped)
                if content is None:
                    continue
                try:
                    content.decode()
                except UnicodeDecodeError:
                    self._bad("not UTF-8", "is not UTF-8", where, skipped)
                    continue
                yield name, content


def _opened(path: str | None, name: str, file: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError("data.corpus=parquet: needs pyarrow, which is not installed: pip install pyarrow") from None
    try:
        table = pq.ParquetFile(file, page_checksum_verification=True)
        table.schema_arrow.names  # noqa: B018  (what is damaged may show here)
    except Exception as error:  # pyarrow's own, and what its bindings raise
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"data.path={path}: {name} is no Parquet file, or a damaged one ({why})") from None
    return table
