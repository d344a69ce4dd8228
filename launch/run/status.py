"""The state of a run, read from its folder, as `farspan status` prints it."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data import reading
from launch.errors import UserError
from launch.run import rundir
from launch.run.progress import TAIL_BYTES, duration, of_tokens
from launch.run.signals import stop_file
from train.guards.hang_timeout import LEAST_S, STEPS
from train.settings import ClusterSettings, TrainSettings, section

_Kind = TypeVar("_Kind")
_RATE_STEPS = 32  # the rate is that over this many steps


@dataclass(frozen=True)
class Status:
    """A run at one moment. tokens_per_second: of wall time over the last steps. restarts: attempts after the first.
    still: seconds without a step, where these are more than its steps explain."""

    folder: Path
    state: str
    step: int
    total_steps: int
    tokens: int
    total_tokens: int
    loss: float | None
    heldout: tuple[float, int, str] | None
    tokens_per_second: float | None
    seconds_since: float | None
    checkpoint: str | None
    restarts: int
    still: float | None = None

    def lines(self) -> list[str]:
        """A line a fact, aligned."""
        loss = "none yet" if self.loss is None else f"{self.loss:.3f}"
        heldout = ""
        if self.heldout:
            loss_there, at, of = self.heldout
            heldout = f"  (held-out {loss_there:.3f}{of} at step {at:,})"
        rate = "none yet"
        if self.tokens_per_second:
            rate = f"{self.tokens_per_second:,.0f} tokens/s"
            if self.state in ("running", "stopping"):
                rate += f", {duration((self.total_tokens - self.tokens) / self.tokens_per_second)} left"
        still = f", stands still: no step for {duration(self.still)}" if self.still is not None else ""
        since = f", last step {ago(self.seconds_since)}" if self.seconds_since is not None else ""
        share = f"{min(100, 100 * self.tokens // self.total_tokens)}%"
        return [
            f"run         {self.folder}: {self.state}{still or since}",
            f"step        {self.step:,} of {self.total_steps:,} ({share}), {self.tokens:,} tokens",
            f"loss        {loss}{heldout}",
            f"rate        {rate}",
            f"checkpoint  {self.checkpoint or 'none yet'}",
            f"restarts    {self.restarts}",
        ]


def read(folder: Path, *, running: bool | None = None) -> Status:
    """The status of the run in `folder`. running: what its cluster says; by default, whether a process here has it."""
    config = rundir.saved_config(folder)
    if "train" not in config:
        raise UserError(f"{folder}: is an import and has trained nothing")
    train = _section(folder, config, "train", TrainSettings)
    records = tail(folder / "metrics.jsonl")
    last: dict[str, Any] = records[-1] if records else {}
    evaluated = (r for r in reversed(records) if r.get("heldout_loss"))
    heldout = next(((r["heldout_loss"], r["step"], of_tokens(r)) for r in evaluated), None)
    attempt = [r for r in records[-_RATE_STEPS - 1 :] if r.get("attempt") == last.get("attempt")]
    rate = last.get("tokens_per_second")
    if len(attempt) > 1 and attempt[-1]["time"] > attempt[0]["time"]:
        rate = (attempt[-1]["tokens"] - attempt[0]["tokens"]) / (attempt[-1]["time"] - attempt[0]["time"])
    newest = _newest(folder / "checkpoints")
    saved = f"{newest[1]}, {ago(time.time() - newest[2])}" if newest else None
    running = rundir.locked(folder) if running is None else running
    return Status(
        folder=folder,
        state=_state(folder, last, train, running),
        step=last.get("step", 0),
        total_steps=_steps(train, last.get("step", 0), last.get("tokens", 0)),
        tokens=last.get("tokens", 0),
        total_tokens=train.total_tokens,
        loss=last.get("loss"),
        heldout=heldout,
        tokens_per_second=rate,
        seconds_since=time.time() - last["time"] if last else None,
        checkpoint=saved,
        restarts=max(0, last.get("attempt", 1) - 1),
        still=_still(attempt, _section(folder, config, "cluster", ClusterSettings).timeout) if running else None,
    )


def _section(folder: Path, config: dict[str, Any], name: str, kind: type[_Kind]) -> _Kind:
    """A section of a run's configuration, which may come from elsewhere. Raises UserError."""
    try:
        return section(kind, config[name])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        why = str(error) if type(error) is ValueError else f"{name} holds values of other kinds: {error}"
        raise UserError(f"{folder}: config.yaml: {' '.join(why.split())[:300]}") from None


def _newest(folder: Path) -> tuple[int, str, float] | None:
    """The step, the name and the time of the newest complete checkpoint: found without torch, which takes seconds."""
    checkpoints = ((path.parent.name, path) for path in folder.glob("step-*/manifest.json"))
    steps = [(int(name[5:]), name, path.stat().st_mtime) for name, path in checkpoints if name[5:].isdecimal()]
    return max(steps, default=None)


def _still(records: list[dict[str, Any]], timeout: float | None) -> float | None:
    """Seconds since the last record, where a rank would by then ask who holds the others up
    (`train.guards.hang_timeout`), and
    where an evaluation or a checkpoint among the last steps does not explain them; else None."""
    gaps = [after["time"] - before["time"] for before, after in zip(records, records[1:], strict=False)]
    if len(gaps) < 2:
        return None
    patience = timeout or max(LEAST_S, STEPS * statistics.median(gaps))
    since = time.time() - records[-1]["time"]
    return since if since > max(patience / 2, 2 * max(gaps)) else None


def _steps(train: TrainSettings, step: int, tokens: int) -> int:
    """Steps of the whole run: as many as its budget takes where steps go on bringing as many tokens as up to now."""
    if not tokens or train.steps is not None or tokens >= train.ramp.before(step):
        return train.total_steps
    return max(train.total_steps, round(step * train.total_tokens / tokens))


def _state(folder: Path, last: dict[str, Any], train: TrainSettings, running: bool) -> str:
    if running:
        return "stopping" if stop_file(folder).exists() else "running" if last else "starting"
    if train.complete(last.get("step", 0), last.get("tokens", 0)):
        return "complete"
    return "failed" if (folder / "error.txt").exists() else "stopped" if last else "not started"


def tail(path: Path) -> list[dict[str, Any]]:
    """The whole records at the end of metrics.jsonl."""
    try:
        with reading.opened(path) as file:
            start = max(0, path.stat().st_size - TAIL_BYTES)
            file.seek(start)
            lines = file.read(TAIL_BYTES).split(b"\n")
    except ValueError:
        return []
    records = []
    for line in lines[1 if start else 0 : -1]:
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [record for record in records if reading.is_step(record) and {"tokens", "time"} <= record.keys()]


def ago(seconds: float) -> str:
    """ "12 s ago", "2:13 ago": how long since."""
    return f"{seconds:.0f} s ago" if seconds < 60 else f"{duration(seconds)} ago"
