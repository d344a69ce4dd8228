"""`farspan status`, `logs`, `stop` and `list`: runs here, and jobs of a cluster."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.cluster.jobs import _CHATTER, _POLL_S, Follow, Jobs
from launch.commands.arguments import job_arguments
from launch.errors import UserError
from launch.paths import RUNS
from launch.run import rundir
from launch.run.signals import ask_to_stop
from launch.run.status import ago, read
from launch.shell import command, override

_TAIL = 12  # last lines of the log that `status` shows where the run folder cannot be seen


def status(arguments: list[str]) -> int:
    """Prints how a job, or a run here, stands."""
    word, address, _ = job_arguments("status", arguments)
    folder = _here(word)
    if folder is not None and address is None:
        print("\n".join(read(folder).lines()))
        return 0
    cluster = Jobs(address)
    info = cluster.find(word)
    since = f", started {ago(time.time() - info.start_time / 1000)}" if info.start_time else ""
    print(f"job         {word} on {cluster.address}: {info.status.value.lower()}{since}")
    folder = Path((info.metadata or {}).get("run", word))
    if (folder / "config.yaml").exists():
        print("\n".join(read(folder, running=not info.status.is_terminal()).lines()))
    else:
        print(f"run         {folder}, which cannot be seen from here; the last lines of its log:")
        print("\n".join(_own_lines(cluster.logs(word))[-_TAIL:]))
    return 0


def _log(path: Path) -> str:
    """Returns the words of a run here; "" of one that has said nothing. Raises UserError."""
    from data import reading

    try:
        return reading.content(path, 1 << 30).decode(errors="replace") if path.exists() else ""
    except ValueError as error:
        raise UserError(f"{path.parent}: {error}") from None


def logs(arguments: list[str]) -> int:
    """Prints what a job has said; with --follow, on to its end."""
    word, address, follow = job_arguments("logs", arguments, flags=("--follow", "-f"))
    folder = _here(word)
    if folder is not None and address is None:
        address = rundir.last_job(folder)[1]
        word = rundir.last_job(folder)[0] or word
        if address is None:
            print(_log(folder / "log.txt"), end="")
            return 0
    cluster = Jobs(address)
    cluster.find(word)
    if not follow:
        print("\n".join(_own_lines(cluster.logs(word))))
        return 0
    try:
        for line in Follow(cluster, word).lines():
            print(line, flush=True)
    except KeyboardInterrupt:
        print(f"no longer following {word}, which goes on", file=sys.stderr)
        return 0
    return cluster.exit_code(word)


def stop(arguments: list[str]) -> int:
    """Asks a job, or a run here, to save and end, and waits until it has."""
    word, address, _ = job_arguments("stop", arguments)
    folder = _here(word)
    if folder is not None and address is None:
        job, address = rundir.last_job(folder)
        if address is None or not job:
            return _stop_here(folder)
        word = job
    cluster = Jobs(address)
    info = cluster.find(word)
    if info.status.is_terminal():
        raise UserError(f"{word}: has ended already ({info.status.value.lower()})")
    before = len(_own_lines(cluster.logs(word)))
    cluster.stop(word)
    print(f"asked {word} to save and to end", flush=True)
    for number, line in enumerate(Follow(cluster, word).lines()):
        if number >= before:
            print(line, flush=True)
    again = command("submit", override("resume", word), override("cluster.address", cluster.address))
    print(f"{word} has ended; {again} goes on")
    return 0


def _stop_here(folder: Path) -> int:
    if not rundir.locked(folder):
        raise UserError(f"{folder}: is not running")
    ask_to_stop(folder, lambda line: print("stopping after this step", flush=True))
    while rundir.locked(folder):
        time.sleep(_POLL_S)
    print(f"ended; {command('train', override('resume', folder))} goes on")
    return 0


def list_(arguments: list[str]) -> int:
    """Prints the jobs of a cluster, oldest first."""
    _, address, _ = job_arguments("list", arguments, word=False)
    cluster = Jobs(address)
    table = Table("job", "state", "started", "run", box=None, pad_edge=False)
    for each in cluster.list():
        run = (each.metadata or {}).get("run", "")
        started = ago(time.time() - each.start_time / 1000) if each.start_time else ""
        table.add_row(each.submission_id, each.status.value.lower(), started, run)
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    console.print(table if table.row_count else f"no jobs at {cluster.address}")
    return 0


def _here(word: str) -> Path | None:
    """The folder of the run that a word names on this machine, or None."""
    try:
        return rundir.run_folder("JOB", word)
    except UserError:
        if any(rundir.has(folder, "config.yaml") for folder in (Path(word), RUNS / word)):
            raise  # it is here, and no run that can be read
        return None


def _own_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not any(words in line for words in _CHATTER)]
