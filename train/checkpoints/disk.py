"""Files that have reached the disk, with their checksums; and a disk that takes no more."""

import errno
import os
import zlib
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from data import reading

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskError(Exception):
    """A checkpoint that a full disk has no room for: those before it are whole, and nothing of it is left."""


def no_room(error: BaseException) -> str | None:
    """Returns what the system says where a disk is full or may not hold more, wherever that is in an error; None for
    another.

    torch's writer hides it behind words of its own.
    """
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, OSError) and each.errno in NO_ROOM:
            return str(each.strerror)
        if isinstance(each, RuntimeError) and "inline_container" in str(
            each
        ):  # torch's file has not grown as it should
            return "the disk takes no more"
        if isinstance(each, CheckpointException):
            waiting += [inner for inner, _ in each.failures.values()]
        waiting += [inner for inner in (each.__cause__, each.__context__) if inner is not None]
    return None


def checksum(path: Path, *, sync: bool = False) -> tuple[int, int]:
    """(bytes, CRC-32) of a file; with `sync`, after it has reached the disk."""
    crc, size = 0, 0
    with path.open("rb+") if sync else reading.opened(path) as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc


def write_text(path: Path, text: str) -> None:
    """Writes a file, and returns when it has reached the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder have reached the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
