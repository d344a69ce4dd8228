"""`metrics.jsonl`, the complete record of a run, and `log.txt`, its notices.

`metrics.jsonl` is only ever appended to. A step that is trained again, after a restart from an older checkpoint, is
written again with its `attempt`; `records` reads what counts.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data import reading

BLOCK_BYTES = 1 << 20  # read at a time; holds the last records of any run


class JsonlWriter:
    """One JSON object a line, each flushed whole, so that a reader who follows the file sees whole records.

    Opening continues an existing file; a last line that a crash has cut is removed. `lines` is how many there are.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        with path.open("rb") as file:
            self.lines, whole = _count(file)
        if whole < path.stat().st_size:
            self._file.truncate(whole)

    def log(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append a record: numbers (tensors and arrays too), strings, lists and dicts of them. Returns what it wrote.

        JSON has no NaN and no infinity: they are written as null, and "nonfinite" lists their names ("grad_norm",
        "expert_load/layers.0/3"). Raises TypeError for a value JSON cannot hold, OSError where it cannot be written.
        """
        nonfinite: list[str] = []
        plain = _plain(record, "", nonfinite)
        if nonfinite:
            plain["nonfinite"] = nonfinite
        self._file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self.lines += 1
        return plain

    def close(self) -> None:
        self._file.close()


def records(path: str | Path, *, every_attempt: bool = False) -> list[dict[str, Any]]:
    """The records of a run's steps in step order, one a step; [] where there is no file.

    Of a step trained more than once, the newest attempt's counts. An attempt that starts again from step N supersedes
    all that older ones did after N, steps included that it has not reached itself: its weights know nothing of them.
    With `every_attempt`, all records as written. A cut last line, and lines that are no step's, are passed over.
    """
    path = Path(path)
    if not path.exists():
        return []
    with reading.opened(path) as file:
        steps = _steps(file)
        return list(steps) if every_attempt else _newest(steps)


def newest_attempt(path: str | Path) -> int:
    """The largest attempt among the last records of `metrics.jsonl`, 0 where it has none. Reads the file's end only."""
    path = Path(path)
    if not path.exists():
        return 0
    with reading.opened(path) as file:
        if (size := path.stat().st_size) > BLOCK_BYTES:
            file.seek(size - BLOCK_BYTES)
            file.readline()  # the end of a record
        return max((record.get("attempt", 1) for record in _steps(file)), default=0)


def _newest(steps: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    last_steps: list[dict[str, Any]] = []
    newest = 0
    for record in steps:
        attempt = record.get("attempt", 1)
        if attempt < newest:  # a worker that was given up as lost, and wrote on
            continue
        newest = attempt
        while last_steps and last_steps[-1]["step"] >= record["step"]:
            last_steps.pop()
        last_steps.append(record)
    return last_steps


def _steps(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The lines from here on that are the record of a step."""
    for line in file:
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if reading.is_step(record):
            yield record


def _count(file: BinaryIO) -> tuple[int, int]:
    """Returns how many whole lines a file has, and how many bytes."""
    lines = whole = read = 0
    while block := file.read(BLOCK_BYTES):
        lines += block.count(b"\n")
        whole = read + end + 1 if (end := block.rfind(b"\n")) >= 0 else whole
        read += len(block)
    return lines, whole


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    """`value` in JSON's own types; the names of what is not finite are added to `nonfinite`."""
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(inner, f"{name}/{key}" if name else str(key), nonfinite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{name}/{index}", nonfinite) for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    return value


class RunLog:
    """The run's notices for people, one line each with the local time, appended to `log.txt` and flushed.

    A notice that the disk has no room for goes to standard error: it may be the one that says so.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()  # the loop and the threads of the sinks

    def __call__(self, line: str) -> None:
        with self._lock:
            try:
                self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
                self._file.flush()
            except OSError:
                with contextlib.suppress(OSError, ValueError):
                    print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
