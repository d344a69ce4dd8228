"""Stopping: by a file that every worker can see at the end of a step, and by the signals that create it.

The file works the same for processes here, for Ray's workers and for other machines that share the run folder, and
it needs no handler in a worker, whose main thread may be deep inside a collective.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # of a launcher, for its workers to leave to it
AT_ONCE = "stopped at once: what was done since the last checkpoint is lost"


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask for a stop. A terminal that goes away sends SIGHUP; what `nohup` starts ignores it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM) if ignored else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler that raises KeyboardInterrupt. Further hang-ups are ignored: kernel and shell send one each."""
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def stop_file(run_dir: Path) -> Path:
    """The empty file whose existence asks the workers to save and return after this step."""
    return run_dir / "stop"


def ask_to_stop(run_dir: Path, say: Callable[[str], None] = print) -> None:
    """Ask the workers of `run_dir` to stop after this step, and say so."""
    stop_file(run_dir).touch()
    say("stopping after this step (again: at once)")


def fresh(run_dir: Path) -> Path:
    """`run_dir` as an absolute path, existing, without the stop file and error of an earlier attempt."""
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    stop_file(run_dir).unlink(missing_ok=True)
    (run_dir / "error.txt").unlink(missing_ok=True)
    return run_dir


@contextmanager
def interrupted(hear: Callable[[int, FrameType | None], None] = interrupt) -> Iterator[None]:
    """Around what a process is there for: stop signals interrupt it, and afterwards none changes its exit code."""
    numbers = stop_signals()
    for number in numbers:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)


class Listener:
    """While entered, `hear` handles the stop signals; the handlers of before come back at the end.

    Outside of the main thread, where Python allows no handlers, it hears nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def hear(self, number: int, frame: FrameType | None) -> None:
        interrupt(number, frame)

    def numbers(self) -> tuple[signal.Signals, ...]:
        return stop_signals()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers():
                self._before[number] = signal.signal(number, self.hear)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Stopping(Listener):
    """While entered, the first SIGINT, SIGTERM or SIGHUP asks the workers to stop, and a second one to end at once.

    Nobody hangs up to hurry: SIGHUP comes from the kernel and from the shell, and counts as no second one.

    The handlers only count: what they ask for happens in `attend`, which the waiting loop calls, so that nothing is
    printed from inside a handler.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None] = print) -> None:
        super().__init__()
        self._run_dir = run_dir
        self._say = say
        self._count = 0
        self._hung_up = False
        self._asked = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._hung_up = True
        else:
            self._count += 1

    def attend(self) -> bool:
        """Do what the signals so far ask for; True when they ask to stop at once."""
        if (self._count or self._hung_up) and not self._asked:
            self._asked = True
            ask_to_stop(self._run_dir, self._say)
        return self._count > 1


class SignalLatch(Listener):
    """While entered, calling it says whether a stop signal has come, whoever has dealt with it since.

    A run has its own handlers for the time that it trains, and a Ctrl-C in its last step changes nothing about it: the
    sweep would go on with the next member. Outside of a run they raise KeyboardInterrupt.
    """

    def numbers(self) -> tuple[signal.Signals, ...]:
        return tuple(number for number in stop_signals() if number != signal.SIGINT)  # Python's handler raises already

    def __enter__(self) -> Self:
        self._heard = False
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        self._wakeup: int | None = None
        if threading.current_thread() is threading.main_thread():
            self._wakeup = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup)
        super().__exit__(*exception)
        self._ours.close()
        self._theirs.close()

    def __call__(self) -> bool:
        try:
            while numbers := self._ours.recv(4096):
                self._heard |= bool(SIGNALS & set(numbers))
        except BlockingIOError:
            pass
        return self._heard


class SignalCount(Listener):
    """While entered, stop signals are counted; the third raises, for a cluster that has stopped answering.

    SIGHUP, which comes more than once, counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.count = max(self.count, 1) if number == signal.SIGHUP else self.count + 1
        if self.count > 2:
            raise KeyboardInterrupt
