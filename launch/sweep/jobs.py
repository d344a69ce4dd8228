"""The members of a sweep as jobs of a running Ray: as many at a time as it has room for, and one that waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from launch.cluster import nodes
from launch.cluster.inspection import PASSED
from launch.cluster.jobs import Jobs
from launch.cluster.package import REFUSED
from launch.errors import UserError
from launch.run import status
from launch.run.signals import SignalCount
from launch.runner import submit
from launch.shell import command, override
from launch.sweep.members import CheckedMember, Member
from launch.sweep.record import Sweep

POLL_S = 1.0
SUMMARY_S = 60.0  # seconds between two summaries


def run(sweep: Sweep, ready: list[CheckedMember], following: list[Member], say: Callable[[str], None]) -> None:
    """Hands the members over and waits for their ends. A stop signal stops all; a second one leaves them to it.

    following: members that are jobs already. A waiting job waits by itself, in a driver that takes memory on the head:
    so one more than the room holds is submitted, no more.
    """
    fleet = _Fleet(sweep, ready, following, say)
    with SignalCount() as signals:
        while fleet.busy:
            if signals.count > 1:
                say(f"no longer following; {command('sweep', override('resume', sweep.folder))} takes it up again")
                return
            if signals.count:
                fleet.stop()
            fleet.submit()
            fleet.look()
            fleet.summarise()
            time.sleep(POLL_S)


class _Fleet:
    """The members that wait for their turn, and those that are jobs."""

    def __init__(
        self, sweep: Sweep, ready: list[CheckedMember], following: list[Member], say: Callable[[str], None]
    ) -> None:
        self._sweep, self._say = sweep, say
        self._waiting = list(ready)
        self._jobs = {member.number: (member, Jobs(member.address), 0) for member in following}
        self._room = _room(ready[0]) if ready else 0
        self._stopping = False
        self._silent = False
        self._next_summary = time.monotonic() + SUMMARY_S

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._jobs)

    def submit(self) -> None:
        """Hands over as many as fit, and one more."""
        while self._waiting and sum(workers for _, _, workers in self._jobs.values()) <= self._room:
            each = self._waiting.pop(0)
            member = each.member
            try:
                submitted = submit.hand_over(each.config, lambda line: None, each.elsewhere)
            except UserError as error:
                self._change(member, "failed", str(error))
                continue
            member.job, member.address = submitted.job, submitted.cluster.address
            self._jobs[member.number] = member, submitted.cluster, each.config.cluster.workers
            self._change(member, "running")

    def look(self) -> None:
        """Notes the jobs that have ended. A cluster that does not answer is asked again."""
        for member, cluster, _ in list(self._jobs.values()):
            try:
                if not cluster.ended(member.job or ""):
                    continue
                state, reason = end(self._sweep, member, cluster, stopping=self._stopping)
            except UserError as error:
                if not self._silent:
                    self._say(f"{error}; asking again")
                self._silent = True
                return
            del self._jobs[member.number]
            self._change(member, state, reason)
        self._silent = False

    def stop(self) -> None:
        """Once: starts no more, and asks every job to save and to end."""
        if self._stopping:
            return
        self._stopping = True
        self._waiting.clear()
        self._say(f"stopping {len(self._jobs)} jobs after their steps (again: stop following them)")
        for member, cluster, _ in self._jobs.values():
            try:
                cluster.stop(member.job or "")
            except UserError as error:
                self._say(f"{member.number}: {error}")

    def summarise(self) -> None:
        """Now and then, a line on where all are."""
        if time.monotonic() < self._next_summary:
            return
        self._next_summary = time.monotonic() + SUMMARY_S
        states = [member.state for member in self._sweep.members]
        running = ", ".join(f"{member.number}{self._percent(member)}" for member, _, _ in self._jobs.values())
        others = [f"{states.count(s)} {s}" for s in ("done", "failed", "stopped", "waiting") if s in states]
        self._say("; ".join([*([f"running: {running}"] if running else []), *others]))

    def _change(self, member: Member, state: str, reason: str | None = None) -> None:
        self._sweep.mark(member, state, reason)
        result = next(each for each in self._sweep.results() if each.member is member)
        words = f"job {member.job}" if state == "running" else reason or ""
        if state == "done" and result.heldout is not None:
            words = f"held-out {result.heldout:.4f}"
        line = f"[{member.number}/{len(self._sweep.members)}] {member.words}: {state}"
        self._say(f"{line}, {words}" if words else line)

    def _percent(self, member: Member) -> str:
        try:
            state = status.read(self._sweep.place(member), running=True)
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return ""
        return f" ({100 * state.tokens // max(state.total_tokens, 1)}%)"


def end(sweep: Sweep, member: Member, cluster: Jobs, *, stopping: bool = False) -> tuple[str, str | None]:
    """The state of a member whose job has ended, and why it failed: by its folder, else by what the job has said."""
    job = member.job or ""
    code = cluster.exit_code(job)
    logs = cluster.logs(job).splitlines()
    if code:
        opening = REFUSED if code == 2 else "failed: "
        reason = next((line.removeprefix(opening) for line in reversed(logs) if line.startswith(opening)), None)
        return "failed", reason or f"job {job}: {cluster.message(job) or f'exit code {code}'}"
    if (sweep.place(member) / "config.yaml").exists():
        complete = status.read(sweep.place(member), running=False).state == "complete"
        return ("done" if complete else "stopped"), None
    if not any(line.startswith(PASSED) for line in logs):
        return "waiting", None  # it was stopped while it waited for its turn
    return ("stopped" if any(line.startswith("stopped") for line in logs) else "done"), None


def _room(each: CheckedMember) -> int:
    """Workers that the cluster holds, whoever uses them now."""
    return sum(node.slots for node in nodes.room(each.config.cluster, each.device))
