"""The progress of a run for a person who watches: read from the two files of its folder, so from any process.

`metrics.jsonl` gives the numbers and `log.txt` the notices. A terminal shows a bar that stays at the bottom, with the
notices above it; anything else (a file, a pipe, CI) gets plain lines, few enough to read afterwards.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console

TAIL_BYTES = 1 << 20  # enough for the last record: some kilobytes, more with many experts
SHOWN = {"step", "tokens", "time", "loss"}
HELD_OUT = ("heldout_loss", "heldout_accuracy", "heldout_tokens", "heldout", "heldout_loss_average")
SPEED_STEPS = 32  # the speed shown is that over this many steps


class ProgressBar:
    """Follows the run in `run_dir` towards `total_tokens`; call `tick` a few times a second, and `close` at the end.

    console       where to write; default: the standard error stream
    interval      seconds between plain lines. The first step, every held-out result and the last step are always shown
    from_end      the run is resumed: what its files hold already is known, and not shown again

    The speed, and the time left that follows from it, is the tokens per second of wall time over the last steps,
    evaluation and checkpoints included.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_tokens: int,
        *,
        console: Console | None = None,
        interval: float = 10.0,
        from_end: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._metrics = _Follower(Path(run_dir) / "metrics.jsonl", from_end)
        self._log = _Follower(Path(run_dir) / "log.txt", from_end)
        self._total = total_tokens
        self._console = console or Console(stderr=True, emoji=False)
        self._interval = interval
        self._clock = clock
        self._last: dict[str, Any] | None = None
        self._held_out: dict[str, Any] = {}
        self._seen: deque[tuple[float, int]] = deque(maxlen=SPEED_STEPS + 1)
        self._next_line = -float("inf")
        self._unshown = False
        self._bar: rich.progress.Progress | None = None
        if from_end:
            self._log.lines()
            self._last = next(reversed(list(self._records())), None)
        if self._console.is_interactive:
            columns = rich.progress.BarColumn(None), rich.progress.TextColumn("{task.description}", markup=False)
            self._bar = rich.progress.Progress(*columns, console=self._console, auto_refresh=False, expand=True)
            self._task = self._bar.add_task("starting", total=total_tokens, completed=self._tokens())
            self._bar.start()

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest record seen, or None before the first."""
        return self._last

    def tick(self) -> None:
        """Show what is new. Files that do not exist yet, half-written lines and rewritten files are all in order."""
        for line in self._log.lines():
            self._print(line)
        for record in self._records():
            self._take(record)
        if self._bar:
            self._bar.update(self._task, completed=self._tokens())
            self._bar.refresh()

    def close(self) -> None:
        """Show what is left, with the last step, and take the bar down. Further calls do nothing more."""
        self.tick()
        if self._unshown and self._last:
            self._print_step(self._last)
        if self._bar:
            self._bar.stop()

    def _records(self) -> Iterator[dict[str, Any]]:
        """The new records. Of a rewritten file (steps are trained again), those later than the last one seen."""
        lines = self._metrics.lines()
        known = self._last["time"] if self._last and self._metrics.rewritten else -float("inf")
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.keys() >= SHOWN and record["time"] > known:
                yield record

    def _take(self, record: dict[str, Any]) -> None:
        first = not self._seen
        if self._seen and record["tokens"] <= self._seen[-1][1]:  # trained again
            self._seen.clear()
        self._seen.append((record["time"], record["tokens"]))
        self._last = record
        if self._bar:
            if "heldout_loss" in record:
                self._held_out = {key: record[key] for key in HELD_OUT if key in record}
            text = f"{self._percent(record)}  step {record['step']}  {self._results(self._held_out | record)}"
            self._bar.update(self._task, description=text)
        elif first or "heldout_loss" in record or self._clock() >= self._next_line:
            self._print_step(record)
        else:
            self._unshown = True

    def _print_step(self, record: dict[str, Any]) -> None:
        tokens = f"{record['tokens']:,} tokens ({self._percent(record)})"
        self._print(f"step {record['step']}  {tokens}  {self._results(record)}")
        self._next_line = self._clock() + self._interval
        self._unshown = False

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _percent(self, record: dict[str, Any]) -> str:
        return f"{min(100, 100 * record['tokens'] // self._total)}%"

    def _results(self, record: dict[str, Any]) -> str:
        parts = [f"loss {_loss(record['loss'])}"]
        if "heldout_loss" in record:
            accuracy = record.get("heldout_accuracy")
            right = "" if accuracy is None else f" ({100 * accuracy:.1f}% right)"
            parts.append(f"held-out {_loss(record['heldout_loss'])}{right}{of_tokens(record)}")
            if by_source := record.get("heldout"):
                parts.append(", ".join(f"{name} {_loss(means['loss'])}" for name, means in by_source.items()))
        if "heldout_loss_average" in record:
            parts.append(f"of the average {_loss(record['heldout_loss_average'])}")
        if speed := self._speed(record):
            left = max(0, self._total - record["tokens"]) / speed
            parts += [f"{speed:,.0f} tok/s", f"{duration(left)} left"]
        return "  ".join(parts)

    def _speed(self, record: dict[str, Any]) -> float:
        """Tokens per second over the steps in view; of the step itself where it is the only one."""
        (start, before), (end, after) = self._seen[0], self._seen[-1]
        return (after - before) / (end - start) if end > start else record.get("tokens_per_second") or 0.0

    def _tokens(self) -> int:
        return self._last["tokens"] if self._last else 0


class _Follower:
    """The lines that another process appends to a file, which it may also replace by a shorter one.

    `rewritten` tells whether the lines last returned are the tail of such a new file, known lines among them.
    """

    def __init__(self, path: Path, from_end: bool):
        self.rewritten = False
        self._path = path
        self._file_id: int | None = None
        self._offset = max(0, path.stat().st_size - TAIL_BYTES) if from_end and path.exists() else 0

    def lines(self) -> list[str]:
        """The whole lines since the last call; the first may be the end of one where the tail of a file was read."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            self.rewritten = self._file_id not in (None, status.st_ino) or status.st_size < self._offset
            self._file_id = status.st_ino
            if self.rewritten:
                self._offset = max(0, status.st_size - TAIL_BYTES)
            file.seek(self._offset)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        return text[:whole].decode(errors="replace").split("\n")[:-1]


def of_tokens(record: dict[str, Any]) -> str:
    """Says how many held-out tokens an evaluation read: those before the end may read a part."""
    read = record.get("heldout_tokens")
    return "" if read is None else f" of {read:,} tokens"


def _loss(value: float | None) -> str:
    """A loss is null in the record where it is not finite."""
    return "not finite" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """2:13, 1:02:13 or 3d 01:02."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
