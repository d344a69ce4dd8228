"""`farspan submit`: hand a run over to a running Ray as a job of its own, and return."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from launch import paths
from launch.cluster import jobs, nodes, package
from launch.cluster.inspection import PASSED
from launch.cluster.jobs import Jobs
from launch.cluster.package import REFUSED
from launch.cluster.placement import place
from launch.errors import UserError
from launch.paths import RUNS
from launch.preflight.check import check_run
from launch.preflight.checked import CheckedRun
from launch.preflight.configure import configure
from launch.preflight.refusals import refusals
from launch.run import rundir
from launch.runner.result import RunResult
from launch.shell import override, quote
from train.run_config import RunConfig

# The interpreter that runs Ray, whatever `python` means on its machine: Ray runs a job's entry point below its job
# supervisor, and that below the raylet, whose arguments tell how it starts Python. `exec`: signals reach Python.
# On one line: Ray repeats it in the job's log.
ENTRYPOINT = "; ".join(
    (
        r"raylet=$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$PPID/status 2>/dev/null)",
        r"python=$(tr '\0' '\n' 2>/dev/null < /proc/${raylet:-none}/cmdline | sed -n "
        r"""-e 's/^--python_worker_command="\([^"]*\)".*/\1/p;t' -e 's/^--python_worker_command=\([^ ]*\).*/\1/p')""",
        r"""[ -x "$python" ] || python=$(command -v python || command -v python3)""",
        r"""exec "$python" -m launch.runner.job_main""",
    )
)
_POLL_S = 0.5


def submit(overrides: list[str]) -> int:
    """Submits the run that the overrides describe, waits until its checks have passed, and prints the job's id.

    Raises UserError, also for what only the cluster's machines can see.
    """
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False)

    if not any(each.lstrip("+").startswith("cluster=") for each in overrides):
        overrides = ["cluster=ray", *overrides]
    config, elsewhere = _configure(overrides)
    submitted = hand_over(config, say, elsewhere)
    cluster, job = submitted.cluster, submitted.job
    print(job, flush=True)
    try:
        line = _passed(cluster, job)
    except KeyboardInterrupt:
        say(f"{job} goes on; its checks have not ended yet")
        return 0
    say(line)
    given = f" {override('cluster.address', cluster.address)}"
    say(
        f"  farspan status {job}{given}\n  farspan logs {job} --follow{given}\n"
        f"  farspan stop {job}{given}        # saves, then ends\n  farspan submit resume={job}{given}"
    )
    return 0


@dataclass(frozen=True)
class Submitted:
    """A run that a cluster has taken. job: its id there. folder: of the run, as the cluster's machines see it."""

    cluster: Jobs
    job: str
    folder: Path


def hand_over(config: RunConfig, say: Callable[[str], None], elsewhere: list[str] | None = None) -> Submitted:
    """Checks what can be checked from here, packages code and configuration, and submits.

    elsewhere: the overrides of a resumed run whose folder only the cluster sees; the job composes them there.
    Raises UserError.
    """
    kind = config.cluster.kind
    if kind != "ray":
        raise UserError(f"cluster.kind={kind}: a job needs cluster=ray, with cluster.address=http://HOST:8265")
    address = nodes.address_of(config.cluster.address)
    if not nodes.is_remote(address):
        raise UserError(f"cluster.address={address}: a job needs the dashboard's address, http://HOST:8265")
    cluster = Jobs(address)
    flight = check(config, say)
    config = _settled(flight.config, address, cluster)
    folder = Path(str(config.run.dir))
    if config.resume is None and (folder / "config.yaml").exists():
        raise UserError(f"run.dir={folder}: already holds a run; continue it with {override('resume', folder)}")
    if rundir.locked(folder):
        raise UserError(f"run.dir={folder}: in use by another run")
    job = cluster.free_id(re.sub(r"[^A-Za-z0-9_.-]+", "-", str(config.run.name)))
    order = {"job": job, "address": address, "device": flight.device, "code": rundir.code_version()}
    order |= {"overrides": elsewhere} if elsewhere else {"config": config.to_dict()}
    with tempfile.TemporaryDirectory(prefix="farspan-job-") as place_for_code:
        code = package.stage(Path(place_for_code), order)
        cluster.submit(job, ENTRYPOINT, code, {"run": str(folder), "name": str(config.run.name)})
    return Submitted(cluster, job, folder)


def _settled(config: RunConfig, address: str, cluster: Jobs) -> RunConfig:
    """The configuration of a job: its name and folder are known, and every path is absolute."""
    run = config.run
    name = run.name or (Path(run.dir).name if run.dir else None)
    name = name or cluster.free_id(rundir.stamp())  # another may start in the same second
    run = replace(run, name=name, dir=paths.absolute(run.dir or str(RUNS / name)))
    config = replace(config, run=run, cluster=replace(config.cluster, address=address))
    return replace(paths.with_absolute_paths(config), resume=paths.absolute(config.resume))


def check(config: RunConfig, say: Callable[[str], None]) -> CheckedRun:
    """Checks a job as far as this machine can, its place on the cluster's machines too. Raises
    UserError."""
    flight = check_run(config, say, data_here=False)
    with refusals(config):
        place(flight.cluster.workers, nodes.room(flight.cluster, flight.device), flight.sizes)
    return flight


def attached(config: RunConfig, console: Console) -> RunResult:
    """The run as a job that is followed to its end. SIGINT and SIGTERM stop it (it saves); a second one lets go."""

    def say(line: str) -> None:
        console.print(line, markup=False)

    submitted = hand_over(config, say)
    cluster, job, folder = submitted.cluster, submitted.job, submitted.folder
    say(f"job {job} on {cluster.address}")
    stopped = False
    follow = jobs.Follow(cluster, job)
    while True:
        try:
            for line in follow.lines():
                say(line)
            break
        except KeyboardInterrupt:
            if stopped:
                say(f"no longer following {job}, which saves and ends by itself: farspan status {job}")
                return RunResult(0, folder, True)
            stopped = True
            cluster.stop(job)
            say("stopping after this step (again: stop following)")
    code = cluster.exit_code(job)
    if code == 2:
        raise UserError(_refusal(cluster, job) or "the job was refused")
    return RunResult(code, folder, stopped, None if code == 0 else f"job {job} failed")


def _configure(overrides: list[str]) -> tuple[RunConfig, list[str] | None]:
    """The configuration, and the overrides where only the cluster can read the run that they resume."""
    try:
        return configure(overrides), None
    except jobs.ElsewhereError as error:
        others, folder = [each for each in overrides if not each.startswith("resume=")], quote(str(error.folder))
        return configure([*others, f"run.dir={folder}"]), [*others, f"resume={folder}"]


def _passed(cluster: Jobs, job: str) -> str:
    """Waits until the job's own checks have passed, and returns the line that it says then. Raises UserError."""
    while True:
        ended = cluster.ended(job)
        logs = cluster.logs(job)
        for line in logs.splitlines():
            if line.startswith(PASSED):
                return line.removeprefix(PASSED)
        if ended:
            if refusal := _refusal(cluster, job):
                raise UserError(refusal)
            last = next((line for line in reversed(logs.splitlines()) if line.strip()), cluster.message(job))
            raise UserError(f"job {job} ended before its run started: {last}")
        time.sleep(_POLL_S)


def _refusal(cluster: Jobs, job: str) -> str | None:
    """The line with which a job refused its order."""
    lines = [line for line in cluster.logs(job).splitlines() if line.startswith(REFUSED)]
    return lines[-1].removeprefix(REFUSED) if lines else None
