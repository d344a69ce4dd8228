"""The tracker as the training loop sees it: a call that writes metrics.jsonl and hands the record on, and never waits
for a sink."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Full, Queue
from typing import Any, Protocol

from train.tracking.record import JsonlWriter


class Sink(Protocol):
    """A place that copies of the record go to. Its methods run in one thread; any but `finish` may raise, and is then
    the last.

    patience: seconds that `start`, and that `finish`, may take at most when all goes wrong.
    """

    name: str
    patience: float

    def start(self) -> None: ...

    def log(self, record: dict[str, Any], line: int) -> None:
        """One record, in JSON's types; `line` is its place in metrics.jsonl, from 0, which never goes back."""

    def checkpoint(self, path: Path, facts: dict[str, Any]) -> None: ...

    def alert(self, title: str, text: str, level: str) -> None: ...

    def finish(self, summary: dict[str, Any], exit_code: int) -> None: ...


class Tracker:
    """Every record goes to metrics.jsonl, complete, and then to the sinks. Belongs to one thread, on rank 0.

    queue     records kept for a sink that is slow, or still starting; a new one that finds it full is dropped for that
              sink, and counted: as `tracking/dropped` in the next record that gets through and in the final summary
    timeout   seconds that the sinks get at the end for what is still in their queues
    say       takes one line for log.txt

    Nothing here raises for what a sink does. A sink that fails is left out from then on, with one line.
    """

    def __init__(
        self,
        log: JsonlWriter,
        sinks: Sequence[Sink] = (),
        *,
        queue: int = 1024,
        timeout: float = 15.0,
        say: Callable[[str], None] = print,
    ):
        self._jsonl = log
        self._timeout = timeout
        self._feeds = [_Feed(sink, queue, say) for sink in sinks]
        self._finished = False

    def log(self, record: dict[str, Any]) -> None:
        """Keep one step's record. Raises OSError where metrics.jsonl cannot be written (a full disk)."""
        line = self._jsonl.lines
        plain = self._jsonl.log(record)
        for feed in self._feeds:
            feed.log(plain, line)

    def checkpoint(self, path: Path, facts: dict[str, Any]) -> None:
        """Tell of a complete checkpoint, the folder `path`; facts: its step, tokens, loss. Its files are not read."""
        for feed in self._feeds:
            feed.offer("checkpoint", path, facts)

    def alert(self, title: str, text: str, level: str = "INFO") -> None:
        """Tell a person who does not watch. title: under 64 characters; level: INFO, WARN or ERROR."""
        for feed in self._feeds:
            feed.offer("alert", title, text, level)

    def finish(self, summary: dict[str, Any], exit_code: int = 0) -> None:
        """Close the record, once. `summary`: the run's final numbers; a nonzero exit code marks it as failed.

        Raises OSError where the end of metrics.jsonl cannot be written; the sinks are finished all the same.
        """
        if self._finished:
            return
        self._finished = True
        try:
            self._jsonl.close()
        finally:
            for feed in self._feeds:
                feed.finish(summary, exit_code, self._timeout)


class _Feed:
    """One sink with its bounded queue, and the daemon thread that drains the one into the other.

    A sink has a thread of its own because it may stand still for good (a service that has hung, a network disk): that
    must not stop the others.
    """

    def __init__(self, sink: Sink, limit: int, say: Callable[[str], None]):
        self._sink = sink
        self._say = say
        self._queue: Queue[tuple[str, tuple[Any, ...]] | None] = Queue(limit)
        self._put = self._done = 0  # by the caller's thread, and by ours
        self._dropped = self._told = 0
        self._off = False
        self._end: tuple[dict[str, Any], int] = {}, 0
        self._started, self._drained = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tracking: {sink.name}", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any], line: int) -> None:
        dropped = self._dropped
        if dropped > self._told:
            record = {**record, "tracking": {"dropped": dropped}}
        if self.offer("log", record, line):
            self._told = dropped

    def offer(self, what: str, *given: Any) -> bool:
        """Leave work for the sink, if there is room. Never waits."""
        if self._off:
            return False
        try:
            self._queue.put_nowait((what, given))
        except Full:
            self._dropped += 1
            if self._dropped == 1:
                self._say(
                    f"{self._sink.name} is slow, its queue of {self._queue.maxsize:,} is full: "
                    f"until it keeps up, records go to metrics.jsonl only"
                )
            return False
        self._put += 1
        return True

    def finish(self, summary: dict[str, Any], exit_code: int, timeout: float) -> None:
        """Let the sink take what is left, for `timeout` seconds, and end it; or give it up, and say what it missed."""
        name = self._sink.name
        self._end = summary | {"tracking/dropped": self._dropped}, exit_code
        self._started.wait(self._sink.patience)
        if self._dropped:
            self._say(f"{name} was slow: {self._dropped:,} records were dropped for it; metrics.jsonl has them all")
        deadline = time.monotonic() + timeout
        try:
            self._queue.put(None, timeout=timeout)
        except Full:
            pass
        if not self._drained.wait(max(0.0, deadline - time.monotonic())):
            self._off = True
            self._say(
                f"{name} is given up after {timeout:g} s: {self._put - self._done:,} records were left for it; "
                f"metrics.jsonl has them all"
            )
            return
        self._thread.join(self._sink.patience)

    def _run(self) -> None:
        alive = self._try(f"{self._sink.name} is off for this run", self._sink.start)
        self._started.set()
        stopped = f"{self._sink.name} stopped taking metrics, metrics.jsonl goes on"
        while (work := self._queue.get()) is not None:
            what, given = work
            if not self._off:
                self._try(stopped, getattr(self._sink, what), *given)
            self._done += 1
        self._drained.set()
        if alive:
            self._try(f"{self._sink.name} did not end cleanly", self._sink.finish, *self._end)

    def _try(self, otherwise: str, function: Callable[..., None], *given: Any) -> bool:
        """Call, and switch the sink off where that fails. wandb leaves with SystemExit when its service is gone."""
        try:
            function(*given)
        except (Exception, SystemExit) as error:
            self._off = True
            self._say(f"{otherwise}: {reason(error)}")
            return False
        return True


def reason(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
