"""Jobs on a running Ray: `farspan status`, `logs`, `stop` and `list`. Where a word names a run here, `status` and
`stop` take that as well.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch import nodes, package, rundir
from launch.shell import command, override
from launch.status import ago, read
from launch.stopping import ask_to_stop
from launch.user import UserError

_POLL_S = 0.5
_SHARE = 20  # a look at a log waits this many times what the last one took: logs of weeks are long
_TAIL = 12  # last lines of the log that `status` shows where the run folder cannot be seen
_CHATTER = ("Running entrypoint for job ", "Runtime env is setting up.")  # Ray's own lines in a job's log


class ElsewhereError(UserError):
    """A job's run folder cannot be seen from this machine."""

    def __init__(self, key: str, value: str, folder: Path) -> None:
        super().__init__(f"{key}={value}: its folder {folder} cannot be seen from this machine")
        self.folder = folder


class Jobs:
    """The jobs of one Ray. Raises UserError where it does not answer, or does not know a job."""

    def __init__(self, address: str | None) -> None:
        self.address = nodes.address_of(address)
        if not nodes.is_remote(self.address):
            raise UserError(
                f"cluster.address={self.address}: jobs are reached through the dashboard; expected http://HOST:8265"
            )
        nodes.check_answers(self.address)
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError:
            raise UserError("cluster: Ray's jobs need ray[default,train]") from None
        with nodes.alone():
            self._client = self._ask(lambda: JobSubmissionClient(self.address))
        for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # they tell of every upload

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"cluster.address={self.address}: Ray answers: {line[:200]}") from None

    def list(self) -> list[Any]:
        """Ray's details of every job that was submitted, oldest first."""
        found = [each for each in self._ask(self._client.list_jobs) if each.submission_id]
        return sorted(found, key=lambda each: each.start_time or 0)

    def find(self, job: str) -> Any:
        """Ray's details of a job. Raises UserError, naming the nearest that exist."""
        known = {each.submission_id: each for each in self.list()}
        if job not in known:
            close = get_close_matches(job, known, n=1)
            hint = f"; nearest: {close[0]}" if close else f"; it has {', '.join(list(known)[-5:]) or 'none'}"
            raise UserError(f"{job}: no such job at {self.address}{hint}")
        return known[job]

    def free_id(self, name: str) -> str:
        """`name`, or `name-2` and so on where that is taken."""
        known = {each.submission_id for each in self.list()}
        return next(i for i in (name, *(f"{name}-{n}" for n in range(2, len(known) + 3))) if i not in known)

    def submit(self, job: str, entrypoint: str, code: Path, metadata: dict[str, str]) -> None:
        """Uploads the folder `code`, and has `entrypoint` run in it."""
        environment = {
            "working_dir": str(code),
            "env_vars": package.environment(),
        }
        self._ask(
            lambda: self._client.submit_job(
                entrypoint=entrypoint, submission_id=job, runtime_env=environment, metadata=metadata
            )
        )

    def ended(self, job: str) -> bool:
        """Whether the job has come to its end, whichever."""
        return self._ask(lambda: self._client.get_job_status(job)).is_terminal()

    def exit_code(self, job: str) -> int:
        """Of an ended job: 0 done or stopped, 1 failed, 2 refused."""
        info = self._ask(lambda: self._client.get_job_info(job))
        if info.status.value in ("SUCCEEDED", "STOPPED"):
            return 0
        return 2 if info.driver_exit_code == 2 else 1

    def message(self, job: str) -> str:
        """Ray's own words about the job."""
        return str(self._ask(lambda: self._client.get_job_info(job)).message or "").strip()

    def logs(self, job: str) -> str:
        """What the job has said so far."""
        return self._ask(lambda: self._client.get_job_logs(job))

    def stop(self, job: str) -> None:
        """Asks the job to save and to end. Returns at once."""
        self._ask(lambda: self._client.stop_job(job))


class Follow:
    """The lines that a job says, from its first, as they come; again from where it was, after an interruption."""

    def __init__(self, cluster: Jobs, job: str) -> None:
        self._cluster, self._job, self._shown = cluster, job, 0

    def lines(self) -> Iterator[str]:
        """Yields until the job has ended and all is said."""
        while True:
            began = time.monotonic()
            ended = self._cluster.ended(self._job)
            text = self._cluster.logs(self._job)
            whole = len(text) if ended else text.rfind("\n") + 1
            new, self._shown = text[self._shown : whole], max(whole, self._shown)
            yield from (line for line in new.splitlines() if not any(words in line for words in _CHATTER))
            if ended:
                return
            time.sleep(max(_POLL_S, _SHARE * (time.monotonic() - began)))


def folder_of(job: str, address: str | None, key: str) -> Path:
    """The run folder of a job. Raises UserError, and ElsewhereError where this machine does not see it."""
    info = Jobs(address).find(job)
    folder = Path((info.metadata or {}).get("run", ""))
    if not (info.metadata or {}).get("run"):
        raise UserError(f"{key}={job}: that job is not one of farspan's")
    if not (folder / "config.yaml").exists():
        raise ElsewhereError(key, job, folder)
    return folder


def status(arguments: list[str]) -> int:
    """Prints how a job, or a run here, stands."""
    word, address, _ = _parse("status", arguments)
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
    """What a run here has said; "" of one that has said nothing. Raises UserError."""
    from data import reading

    try:
        return reading.content(path, 1 << 30).decode(errors="replace") if path.exists() else ""
    except ValueError as error:
        raise UserError(f"{path.parent}: {error}") from None


def logs(arguments: list[str]) -> int:
    """Prints what a job has said; with --follow, on to its end."""
    word, address, follow = _parse("logs", arguments, flags=("--follow", "-f"))
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
    word, address, _ = _parse("stop", arguments)
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
    _, address, _ = _parse("list", arguments, word=False)
    cluster = Jobs(address)
    table = Table("job", "state", "started", "run", box=None, pad_edge=False)
    for each in cluster.list():
        run = (each.metadata or {}).get("run", "")
        started = ago(time.time() - each.start_time / 1000) if each.start_time else ""
        table.add_row(each.submission_id, each.status.value.lower(), started, run)
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    console.print(table if table.row_count else f"no jobs at {cluster.address}")
    return 0


def _parse(
    verb: str, arguments: list[str], *, flags: tuple[str, ...] = (), word: bool = True
) -> tuple[str, str | None, bool]:
    """(the job, cluster.address where given, whether one of `flags` was). Raises UserError."""
    words, address, flagged = [], None, False
    for argument in arguments:
        if argument in flags:
            flagged = True
        elif argument.startswith("cluster.address="):
            address = argument.partition("=")[2]
        elif argument.startswith("-") or "=" in argument:
            accepted = ", ".join(["cluster.address=http://HOST:8265", *flags[:1]])
            raise UserError(f"{argument}: not understood; accepts {accepted}")
        else:
            words.append(argument)
    if word and len(words) != 1:
        raise UserError(f"JOB: expected one, got {len(words)} (farspan {verb} JOB; farspan list shows them)")
    if not word and words:
        raise UserError(f"{words[0]}: {verb} takes no job")
    return "".join(words), address, flagged


def _here(word: str) -> Path | None:
    """The folder of the run that a word names on this machine, or None."""
    try:
        return rundir.run_folder("JOB", word)
    except UserError:
        if any(rundir.has(folder, "config.yaml") for folder in (Path(word), rundir.RUNS / word)):
            raise  # it is here, and no run that can be read
        return None


def _own_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not any(words in line for words in _CHATTER)]
