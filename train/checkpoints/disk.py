"""A disk that takes no more, among the other errors of writing a checkpoint."""

import errno

from torch.distributed.checkpoint.api import CheckpointException

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
