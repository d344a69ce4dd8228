"""Words for people that nobody reads any more: a terminal that was closed, a pipe whose reader left, a full disk.

They are lost, and nothing else is: a run does not depend on who watches it.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class Lasting:
    """A text stream whose writer never hears of a failure to write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            _divert(self._stream, error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            _divert(self._stream, error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive(*, output: bool = False) -> None:
    """Make this process's standard error stream, and with `output` its standard output, a `Lasting` one.

    Descriptors 0 to 2 exist from then on: a file of ours that became one of them would take others' words.
    """
    while (empty := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(empty, True)
    os.close(empty)
    for name in ("stderr", "stdout") if output else ("stderr",):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream))


def gone(error: BaseException) -> bool:
    """Says whether `error` says that standard output has no reader; what is written there from then on is lost."""
    lost = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO) and error.filename is None
    if lost and sys.stdout is not None:
        _divert(sys.stdout, error)
    return lost


def _divert(stream: Any, error: BaseException) -> None:
    """Sends output that nobody will ever read to nowhere: what is buffered has to end somewhere, at the latest at the
    exit."""
    if getattr(error, "errno", None) not in _GONE:
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass
