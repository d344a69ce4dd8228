"""The fork server of workers, forked itself from a launcher that has imported torch, where that is safe.

`multiprocessing` starts its server as a fresh Python, which imports torch a second time: seconds of a job's start. A
fork has only the thread that made it, and a library whose threads are gone waits for them. So a launcher that has begun
threads of its own, or has asked a GPU's driver, starts a server the usual way.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  # its threads, which outlive a fork, are to be there when `_BEFORE` is counted

_TASKS = Path("/proc/self/task")


def _tasks() -> int:
    return len(os.listdir(_TASKS)) if _TASKS.exists() else 0


_BEFORE = _tasks()


def safe() -> bool:
    """Says whether a process forked from this one can do all that a fresh one can."""
    torch: Any = sys.modules.get("torch")
    if sys.platform != "linux" or torch is None or torch.cuda.is_available():
        return False
    return threading.active_count() == 1 and 0 < _tasks() <= _BEFORE


@contextlib.contextmanager
def from_here() -> Iterator[None]:
    """While entered, `multiprocessing` forks its server from this process, if that is safe."""
    if not safe():
        yield
        return
    usual = util.spawnv_passfds
    util.spawnv_passfds = _fork  # type: ignore[assignment]
    try:
        yield
    finally:
        util.spawnv_passfds = usual


def _fork(path: bytes, words: Sequence[Any], passed: Sequence[int]) -> int:
    """Stands in for `util.spawnv_passfds`: runs the program behind `-c` in a fork, with the files `passed` alone."""
    sys.stdout.flush()  # else the fork may write what waits here a second time
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        nothing = os.open(os.devnull, os.O_RDWR)
        for name in os.listdir("/proc/self/fd"):
            # Replaced, not closed: an object that is left from the launcher would close the next file of that number.
            if (fd := int(name)) not in (1, 2, nothing, *passed):
                with contextlib.suppress(OSError):  # the listing's own
                    os.fstat(fd)
                    os.dup2(nothing, fd, inheritable=fd == 0)
        exec(words[words.index("-c") + 1], {"__name__": "__main__"})
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)
