"""Worlds of spawned processes on this machine, without Ray: for tests, debugging, and one machine of its own.

Workers are forked from a server that has imported torch once, so that a second world costs tenths of a second.
They meet at a TCPStore on loopback. Its listening socket is opened here, by the parent, and handed to rank 0: no port
is guessed, and a rank that arrives before rank 0 waits in the socket's own queue. Rank 0 hosts the store, so it is told
to leave when the others have left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from launch import apart
from launch.run.failure import Failure, Outcome, verdict
from launch.run.signals import AT_ONCE, Stopping, fresh
from launch.world import fork
from launch.world.job import Job, signals_held, without_main
from launch.world.worker import work

_POLL_S = 0.2  # seconds between two ticks
_GRACE_S = 3.0  # seconds that the others have to report after a first failure
_TERM_S = 2.0  # seconds between terminate and kill
_LEAVE_S = 20.0  # seconds that a worker may take to leave after its entry has returned
_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
_PRELOAD = (
    "torch",
    "torch._dynamo",  # the first recomputed or hooked layer imports it, a second of each rank
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.utils.flop_counter",
)


def warm(*modules: str) -> None:
    """Start the fork server, which imports torch and `modules` while we go on; returns at once.

    It is forked from this process where that is safe, so that what is imported here is not imported again. Only the
    first call in a process decides on the modules. The server ends with this process.
    """
    get_context("forkserver").set_forkserver_preload([*_PRELOAD, *modules, "launch.world.ready"])
    # Asking for devices while a module is imported must not initialise CUDA, which does not survive a fork.
    before = os.environ.get(_NVML)
    os.environ[_NVML] = "1"
    # A signal to our process group must never reach the server, which the workers' exit codes come through: it keeps
    # the mask that it inherits, and the workers lift it.
    with apart.shielded(), signals_held(), fork.from_here():
        forkserver.ensure_running()
    if before is None:
        del os.environ[_NVML]
    else:
        os.environ[_NVML] = before


def spawn(
    entry: str,
    config: dict[str, Any],
    *,
    workers: int,
    run_dir: Path,
    device: str,
    threads: int,
    tick: Callable[[], None],
    start_timeout: float = 120,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run `entry` ("module:function") with `config` in `workers` processes of one torch.distributed world, and wait.

    `tick` is called about five times a second meanwhile. The first SIGINT or SIGTERM creates run_dir/"stop" and
    tells so through `say`; the second one kills the workers. A failure is an Outcome, with the traces in
    run_dir/"error.txt"; so is a world that has not entered within `start_timeout` seconds. No worker outlives the call.
    Raises ValueError for an unusable argument, and whatever `tick` raises.
    """
    run_dir = fresh(run_dir)
    job = Job(entry, config, workers, run_dir, device, threads)
    with Stopping(run_dir, say) as stopping:
        warm()
        team = _Team(job)
        try:
            team.start()
            return team.watch(tick, stopping, start_timeout)
        finally:
            team.kill()


@dataclass
class _Member:
    """One worker as the parent sees it."""

    rank: int
    process: BaseProcess
    pipe: connection.Connection[Any, Any] | None
    entered: bool = False
    done: bool = False
    left: bool = False


class _Team:
    """The workers of one world: started, listened to, and ended together."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._members: list[_Member] = []
        self._failures: list[Failure] = []
        self._deaths: list[tuple[int, str]] = []
        self._ending = False  # from here on, deaths are our own doing

    def start(self) -> None:
        """Start every worker; the store's socket goes to rank 0."""
        context = get_context("forkserver")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(max(128, self._job.workers))
            port = listener.getsockname()[1]
            for rank in range(self._job.workers):
                ours, theirs = context.Pipe()
                args = (self._job, rank, port, listener if rank == 0 else None, dict(os.environ), theirs)
                process = context.Process(target=work, args=args, name=f"rank-{rank}")
                with without_main():
                    process.start()
                theirs.close()
                self._members.append(_Member(rank, process, ours))

    def watch(self, tick: Callable[[], None], stopping: Stopping, start_timeout: float) -> Outcome:
        """Wait for the end of the world, and say how it was."""
        deadline = time.monotonic() + start_timeout
        leaving: float | None = None
        while self._here():
            tick()
            if stopping.attend():
                return Outcome(False, AT_ONCE, 1)
            self._listen()
            if self._failures or self._deaths:
                self._settle(tick, stopping)
                return verdict(self._failures, self._deaths, self._job.run_dir)
            if not all(member.entered for member in self._members) and time.monotonic() > deadline:
                return Outcome(False, self._late(start_timeout), 1)
            if all(member.done for member in self._members):
                leaving = leaving or time.monotonic() + _LEAVE_S
                if time.monotonic() > leaving:
                    break  # a thread that the entry left behind: its work is done
        return Outcome(True)

    def kill(self) -> None:
        """End every worker that is left, now, and reap it."""
        self._ending = True
        for member in self._here():
            member.process.kill()
        for member in self._members:
            member.process.join()
            if member.pipe is not None:
                member.pipe.close()
            member.process.close()

    def _here(self) -> list[_Member]:
        return [member for member in self._members if not member.left]

    def _late(self, start_timeout: float) -> str:
        missing = [str(member.rank) for member in self._members if not member.entered]
        ranks = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(missing)
        return f"{ranks} did not start within {start_timeout:g} s"

    def _listen(self, timeout: float = _POLL_S) -> None:
        """Hear the reports and departures of the next `timeout` seconds; return after the first."""
        here = self._here()
        pipes = [member.pipe for member in here if member.pipe is not None]
        ready = set(connection.wait([*pipes, *(member.process.sentinel for member in here)], timeout))
        for member in here:
            gone = member.process.sentinel in ready
            if gone or member.pipe in ready:
                self._hear(member)
            if gone:
                self._depart(member)
        # Rank 0 hosts the store: it may go when it is alone.
        rest = self._here()
        if len(rest) == 1 and rest[0].rank == 0 and rest[0].done and rest[0].pipe is not None:
            with contextlib.suppress(OSError):
                rest[0].pipe.send("leave")

    def _hear(self, member: _Member) -> None:
        try:
            while member.pipe is not None and member.pipe.poll():
                report = member.pipe.recv()
                if isinstance(report, Failure):
                    self._failures.append(report)
                else:
                    setattr(member, report, True)
        except (EOFError, OSError):
            assert member.pipe is not None
            member.pipe.close()
            member.pipe = None

    def _depart(self, member: _Member) -> None:
        member.process.join()
        member.left = True
        code = member.process.exitcode or 0
        reported = member.done or any(failure.rank == member.rank for failure in self._failures)
        if self._ending or (reported and code >= 0):
            return
        if code < 0:
            self._deaths.append((member.rank, f"was killed ({_signal_name(-code)})"))
        else:
            self._deaths.append((member.rank, f"left with exit code {code}"))

    def _settle(self, tick: Callable[[], None], stopping: Stopping) -> None:
        """After a first failure: hear the others out for a few seconds, then terminate them; `kill` does the rest."""
        for seconds in (_GRACE_S, _TERM_S):
            deadline = time.monotonic() + seconds
            while self._here() and time.monotonic() < deadline and not stopping.attend():
                tick()
                self._listen()
            self._ending = True
            for member in self._here():
                member.process.terminate()


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
