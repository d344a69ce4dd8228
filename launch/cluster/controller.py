"""A world on Ray: the side that waits.

Ray runs in a process of its own, the driver (`launch.cluster.driver`), in a session of its own. Thus a Ctrl-C reaches
nothing of Ray's, none of its chatter reaches the terminal (it goes to run_dir/.ray/driver.log), its environment
variables stay out of this process, and whatever a Ray of our own has started can be ended for certain: it is the
session. Of a Ray that we have joined, only the driver is ours: it is asked to leave, and Ray ends its workers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from launch import apart
from launch.cluster import package
from launch.cluster.driver import Report, drive, head_answers, scratch
from launch.run.failure import Outcome, verdict
from launch.run.signals import AT_ONCE, Stopping, fresh
from launch.world.job import Job, signals_held, without_main

_POLL_S = 0.2  # seconds between two ticks
_SWEEP_S = 10.0  # seconds until we stop waiting for killed processes to be gone


def fit(
    entry: str,
    config: dict[str, Any],
    *,
    workers: int,
    run_dir: Path,
    device: str,
    threads: int | None,
    tick: Callable[[], None],
    say: Callable[[str], None] = print,
    address: str | None = None,
    sizes: dict[str, int] | None = None,
    patient: bool = False,
) -> Outcome:
    """Run `entry` ("module:function") with `config` in `workers` Ray Train workers, and wait.

    The contract is that of `launch.world.spawn.spawn`: ticks, signals, reasons, error.txt. Without an `address`, Ray is
    started here, joins nothing that runs already, and is gone when this returns. With one (HOST:PORT or auto), the Ray
    there is joined; its machines are compared first, and the mesh's `sizes` are placed on them; where they lack room,
    a `patient` run waits for more machines, another is refused. Raises ValueError for an unusable argument, and
    whatever `tick` raises.
    """
    run_dir = fresh(run_dir)
    job = Job(entry, config, workers, run_dir, device, threads, address, patient, sizes or {})
    if importlib.util.find_spec("ray") is None:
        return Outcome(False, "cluster: Ray is not installed (ray[default,train]); cluster=none runs without it", 2)
    shutil.rmtree(scratch(run_dir), ignore_errors=True)
    scratch(run_dir).mkdir()
    # Ray's sockets live here, and a socket's path has 107 characters at most: a run folder may be too deep.
    place = tempfile.mkdtemp(prefix="farspan-ray-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
    if address is not None:
        job = replace(job, code=str(package.stage(Path(place))))
    outcome = None
    with Stopping(run_dir, say) as stopping:
        try:
            outcome = _watch(job, place, tick, say, stopping)
        finally:
            shutil.rmtree(place, ignore_errors=True)
            if outcome is not None and outcome.ok:
                shutil.rmtree(scratch(run_dir), ignore_errors=True)
    return outcome


def _watch(job: Job, place: str, tick: Callable[[], None], say: Callable[[str], None], stopping: Stopping) -> Outcome:
    """Start the driver, wait for its report, and end its session."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=drive, args=(job, place, theirs), name="ray-driver")
    with without_main(), apart.shielded(), signals_held():
        process.start()
    theirs.close()
    try:
        while True:
            tick()
            if stopping.attend():
                return Outcome(False, AT_ONCE, 1)
            if connection.wait([pipe, process.sentinel], _POLL_S):
                message = _receive(pipe)
                if not isinstance(message, str):
                    return _judge(message, process, job.run_dir)
                say(message)
    finally:
        _end(process, pipe, joined=job.address is not None)


def _receive(pipe: connection.Connection[Any, Any]) -> Report | str | None:
    """The driver's report, or a line for people; None when it ended without a report."""
    try:
        return pipe.recv() if pipe.poll() else None
    except (EOFError, OSError):
        return None


def _judge(report: Report | None, process: BaseProcess, run_dir: Path) -> Outcome:
    log = scratch(run_dir) / "driver.log"
    if report is None:
        process.join(_POLL_S)
        if not head_answers(run_dir):
            return Outcome(False, "the head of Ray was lost with its machine", 1, lost=True)
        why = f"Ray's driver ended without a report, exit code {process.exitcode} (its words: {log})"
        return Outcome(False, why, 1, lost=True)
    if report.ok:
        return Outcome(True)
    if report.failures or report.deaths:
        return verdict(report.failures, report.deaths, run_dir)
    error = run_dir / "error.txt"
    with contextlib.suppress(OSError):  # a full disk may be what it tells of
        error.write_text(report.trace, encoding="utf-8")
    if not head_answers(run_dir):
        return Outcome(False, f"the head of Ray was lost with its machine (full trace: {error})", 1, lost=True)
    return Outcome(False, f"Ray: {report.line} (full trace: {error})", 1, lost=True)


def _end(process: BaseProcess, pipe: connection.Connection[Any, Any], *, joined: bool) -> None:
    """End the driver and, of a Ray of our own, all that it has started.

    By the time we come here the entries have returned or are to be stopped at once, and the folder that a Ray of our
    own keeps its state in is about to go: there is nothing that a polite shutdown, which takes a second, would save.
    """
    session = process.pid
    assert session is not None
    if joined or sys.platform != "linux":  # elsewhere: no /proc to find a session in, so ask Ray itself first
        with contextlib.suppress(OSError):
            pipe.send("leave")
        process.join(_SWEEP_S)
        with contextlib.suppress(OSError):
            os.killpg(session, signal.SIGKILL)
    deadline = time.monotonic() + _SWEEP_S
    while (left := _members(session)) and time.monotonic() < deadline:
        for number in left:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.02)
    process.kill()  # also when it has not come as far as its own session
    process.join()
    process.close()
    pipe.close()


def _members(session: int) -> list[int]:
    """The processes of a session, zombies left out (Linux)."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, theirs = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(theirs) == session and state != "Z":
                members.append(int(folder.name))
    return members
