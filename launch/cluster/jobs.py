"""Jobs on a running Ray: `farspan status`, `logs`, `stop` and `list`. Where a word names a run here, `status` and
`stop` take that as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from launch.cluster import nodes, package
from launch.errors import UserError

_POLL_S = 0.5
_SHARE = 20  # a look at a log waits this many times what the last one took: logs of weeks are long
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
        jobs = [each for each in self._ask(self._client.list_jobs) if each.submission_id]
        return sorted(jobs, key=lambda each: each.start_time or 0)

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
        """Says whether the job has come to its end, whichever."""
        return self._ask(lambda: self._client.get_job_status(job)).is_terminal()

    def exit_code(self, job: str) -> int:
        """The exit code of an ended job: 0 done or stopped, 1 failed, 2 refused."""
        info = self._ask(lambda: self._client.get_job_info(job))
        if info.status.value in ("SUCCEEDED", "STOPPED"):
            return 0
        return 2 if info.driver_exit_code == 2 else 1

    def message(self, job: str) -> str:
        """Ray's own words about the job."""
        return str(self._ask(lambda: self._client.get_job_info(job)).message or "").strip()

    def logs(self, job: str) -> str:
        """Returns the job's log so far."""
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
