"""`farspan train`: check everything, launch the workers, follow them, and say how it ended."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from launch import paths
from launch.cluster import controller, nodes
from launch.errors import UserError
from launch.preflight.check import check_run
from launch.preflight.checked import CheckedRun
from launch.run import rundir, status
from launch.run.failure import Outcome
from launch.run.progress import ProgressBar
from launch.run.signals import stop_file
from launch.runner.result import NOTHING_WRITTEN, JobContext, RunResult
from launch.runner.summary import report, say_where_to_continue
from launch.shell import command, override
from launch.world import spawn
from train.run_config import RunConfig

ENTRY = "train.build:run"
LOCK_S = 300.0  # seconds that a run on a cluster waits for the end of another that has its folder
_TURN_S = 0.5


def await_lock(folder: Path, say: Callable[[str], None]) -> None:
    """Wait for the process that has a run to end, for a bounded time: machines that were replaced may end slowly."""
    deadline = time.monotonic() + LOCK_S
    if rundir.locked(folder):
        say(f"waiting for run.dir={folder}: in use by another run; {LOCK_S:.0f} s at most")
    while rundir.locked(folder) and time.monotonic() < deadline:
        time.sleep(_TURN_S)


def here(
    config: RunConfig,
    console: Console,
    hosted: JobContext | None = None,
    *,
    brief: bool = False,
    again: str | None = None,
) -> RunResult:
    """Runs a composed configuration from this machine; SIGINT and SIGTERM save, and end it with exit code 0."""
    began = time.monotonic()
    folder: Path | None = None

    def say(line: str) -> None:
        console.print(line, markup=False)

    try:
        flight = check_run(config, say, device=hosted.device if hosted else None)
        code = hosted.code if hosted else rundir.code_version()
        config, anew = flight.config, flight.config.run.anew
        if config.cluster.kind == "ray" and config.run.dir:
            await_lock(Path(config.run.dir), say)
        run, lock = rundir.claim(config.run, resumed=config.resume is not None)
        folder = Path(str(run.dir))
        again = hosted.again if hosted else again or command("train", override("resume", folder))
        with lock:
            config = paths.with_absolute_paths(replace(config, run=run))
            flight = replace(flight, config=config)
            try:
                rundir.write_config(folder, config, code)
            except UserError:
                if config.resume is None:
                    rundir.withdraw(folder)
                raise
            _turn_away(flight, folder, say, anew=anew)
            if hosted:
                _note_job(folder, hosted)
            if flight.cluster.kind == "none":
                spawn.warm("train.build", "train.engines.fsdp", "train.optim.adamw", "train.schedules")
            start = f", from {flight.resume or flight.init_from}" if flight.resume or flight.init_from else ""
            say(f"run {folder}: {_place(flight)}{start}")
            _say_missing(flight, folder, say)
            outcome = _attempts(flight, folder, code, hosted, console, say)
            stop_file(folder).unlink(missing_ok=True)
            if outcome.ok:
                return RunResult(0, folder, report(flight, folder, again, say, began, brief=brief))
            say(f"failed: {outcome.reason}")
            if outcome.exit_code == 2:
                rundir.withdraw(folder)
            else:
                say_where_to_continue(folder, again, say)
            return RunResult(outcome.exit_code, folder, False, outcome.reason)
    except KeyboardInterrupt:  # outside of the launchers, which have their own way to hear it
        if folder is None:
            say(NOTHING_WRITTEN)
        else:
            say("stopped while no worker was running")
            say_where_to_continue(folder, again or "", say)
        return RunResult(0, folder, True)


def _say_missing(flight: CheckedRun, folder: Path, say: Callable[[str], None]) -> None:
    """A record that was cut, by a full disk or a lost machine, before the step that the weights are of."""
    if flight.resume is None:
        return
    from train.checkpoints import checkpoint

    records, saved = status.tail(folder / "metrics.jsonl"), checkpoint.manifest(flight.resume)["step"]
    last = max((record["step"] for record in records), default=0)
    if last < saved:
        steps = f"step {saved:,}" if last + 1 == saved else f"steps {last + 1:,} to {saved:,}"
        say(f"{folder}/metrics.jsonl has no record of {steps}, which {flight.resume.name} has been trained on")


def _turn_away(flight: CheckedRun, folder: Path, say: Callable[[str], None], *, anew: bool) -> None:
    """Sets aside what a resumed run does not go on from: later checkpoints than the one that was named, and damaged
    ones where it begins `anew`. The next attempt would else take them up."""
    place, chosen = folder / "checkpoints", flight.resume
    if chosen is None and not anew:
        return
    from train.checkpoints import checkpoint

    if anew:
        away = list(checkpoint.damaged(place))
    elif chosen is not None and rundir.is_checkpoint(Path(str(flight.config.resume))):
        away = [p for p in checkpoint.complete(place) if checkpoint.step_of(p) > checkpoint.step_of(chosen)]
    else:
        return
    for path in away:
        say(f"{path.name} is now {checkpoint.set_aside(path).name}, which nothing reads; remove it when you will")


def _attempts(
    flight: CheckedRun,
    folder: Path,
    code: dict[str, Any],
    hosted: JobContext | None,
    console: Console,
    say: Callable[[str], None],
) -> Outcome:
    """Launches the workers, and again from the last checkpoint when one or a machine was lost.

    `cluster.restarts` of them may follow each other without a new checkpoint in between.
    """
    left, before, again = flight.cluster.restarts, flight.resume, False
    while True:
        # Its files hold records of an earlier attempt by now, even one that left no checkpoint to go on from.
        progress = ProgressBar(folder, flight.train.total_tokens, console=console, from_end=True)
        outcome = _launch(flight, folder, code, hosted, progress, say, again=again)
        progress.close()
        if outcome.ok or not outcome.lost or stop_file(folder).exists():
            return outcome
        from train.checkpoints import checkpoint  # two seconds, that a run which loses nobody does not need

        newest = checkpoint.newest(folder / "checkpoints", lambda line: None)
        if newest is None and checkpoint.damaged(folder / "checkpoints"):
            return outcome  # to begin again is for a person to say
        flight = replace(flight, resume=newest or flight.resume)
        if flight.resume != before:
            left, before = flight.cluster.restarts, flight.resume
        if not left:
            return outcome
        left, again = left - 1, True
        since = f"from {flight.resume.name}" if flight.resume else "from the start: no checkpoint was complete"
        say(f"lost: {outcome.reason}")
        say(f"another attempt goes on {since}; {left} more may follow before the next checkpoint")


def _launch(
    flight: CheckedRun,
    folder: Path,
    code: dict[str, Any],
    hosted: JobContext | None,
    progress: ProgressBar,
    say: Callable[[str], None],
    *,
    again: bool,
) -> Outcome:
    order = {
        "config": flight.config,
        "run_dir": str(folder.resolve()),
        "device": flight.device,
        "code": code,
        "resume": str(flight.resume.resolve()) if flight.resume else None,
        "init_from": str(flight.init_from.resolve()) if flight.init_from else None,
    }
    ours: dict[str, Any] = {
        "workers": flight.cluster.workers,
        "run_dir": folder,
        "device": flight.device,
        "threads": flight.threads,
        "tick": progress.tick,
        "say": say,
    }
    if flight.cluster.kind == "none":
        return spawn.spawn(ENTRY, order, **ours)
    if flight.cluster.kind == "local":
        return controller.fit(ENTRY, order, **ours)
    address = "auto" if hosted else nodes.address_of(flight.cluster.address)
    return controller.fit(ENTRY, order, **ours, address=address, sizes=flight.sizes, patient=again)


def _note_job(folder: Path, hosted: JobContext) -> None:
    """The run remembers the jobs that it was, so that each of their ids finds it."""
    line = json.dumps({"job": hosted.job, "address": hosted.address, "time": time.time()})
    with (folder / rundir.JOBS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _place(flight: CheckedRun) -> str:
    count = sum(math.prod(shape) for shape in flight.shapes.values())
    return (
        f"{count / 1e6:.1f}M parameters, {flight.train.total_tokens:,} tokens, {flight.cluster.workers} workers "
        f"({flight.layout}) on {flight.device}, cluster={flight.cluster.kind}"
    )
