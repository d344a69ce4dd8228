"""Files that may come from elsewhere, read so that none can hang a reader or fill its memory.

A name may belong to a device, a pipe or a folder, a header may lie, and JSON may be nested until Python's stack ends:
each is a ValueError of one line that starts with the file's name.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

JSON_BYTES = 1 << 27  # the most of a JSON file; the largest tokenizer.json is a quarter of it


def opened(path: Path) -> BinaryIO:
    """A regular file, open for reading; a pipe or a device is not waited for. Raises ValueError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror})") from None
    except ValueError:  # a NUL in the name
        raise ValueError(f"{path.name!r}: is no name of a file") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path.name}: is no regular file")
    return os.fdopen(handle, "rb")


def content(path: Path, most: int) -> bytes:
    """All of a regular file of at most `most` bytes. Raises ValueError."""
    with opened(path) as file:
        bytes_read = file.read(most + 1)
    if len(bytes_read) > most:
        raise ValueError(f"{path.name}: has more than {most:,} bytes")
    return bytes_read


def text(path: Path, most: int) -> str:
    """All of a regular file in UTF-8. Raises ValueError."""
    try:
        return content(path, most).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: is no UTF-8 text (byte {error.start})") from None


def json_object(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ValueError for anything else."""
    whole = text(path, most)
    try:
        value = json.loads(whole)
    except (ValueError, RecursionError) as error:
        why = "is nested too deep" if isinstance(error, RecursionError) else f"is not JSON ({error})"
        raise ValueError(f"{path.name}: {why}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: is not a JSON object")
    return value


def json_lines(path: Path, most: int = JSON_BYTES) -> list[dict[str, Any]]:
    """The objects of a file that has one a line; lines that hold none are passed over. Raises ValueError."""
    lines = []
    for line in content(path, most).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            lines.append(record)
    return lines


def is_step(record: Any) -> bool:
    """True for a line of metrics.jsonl that is the record of a step: one from elsewhere may have anything in its
    place."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    return all(
        isinstance(record[key], kind) and record[key] is not True for key, kind in _KINDS.items() if key in record
    )


_NUMBER = (int, float, type(None))
_KINDS: dict[str, Any] = {
    "attempt": int,
    "tokens": int,
    "time": (int, float),
    "seconds": (dict, int, float, type(None)),
    "heldout_tokens": int,
    "heldout_part": dict,
}
_KINDS |= dict.fromkeys(("loss", "lr", "grad_norm", "tokens_per_second", "heldout_loss", "heldout_accuracy"), _NUMBER)
