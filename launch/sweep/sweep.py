"""`farspan sweep`: a run for every combination of values, one folder each, and what they reached side by side.

All members are checked before the first one starts. Here they run one after another, each with all the workers; on a
cluster as many at a time as it holds (`launch.sweep.jobs`). One that fails is noted, and the next one starts.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from rich.console import Console

from launch.cluster import nodes
from launch.cluster.jobs import Jobs
from launch.config import compose
from launch.errors import UserError
from launch.paths import RUNS
from launch.preflight.check import check_run
from launch.preflight.configure import configure
from launch.run import rundir, status
from launch.run.progress import duration
from launch.run.signals import SignalLatch
from launch.runner import submit
from launch.runner.dispatch import run
from launch.shell import command, override, quote
from launch.sweep import members as sweep_members
from launch.sweep import table as sweep_table
from launch.sweep.members import CheckedMember, Member
from launch.sweep.record import FILE, OPEN, Sweep
from train.run_config import RunConfig
from train.settings import RunSettings

PLOT = "sweep.png"
NOTHING_WRITTEN = "stopped before the sweep started: nothing was written"


def sweep(overrides: list[str]) -> int:
    """Runs, or goes on with, a sweep. Returns 0 done or stopped by the user, 1 a member failed. Raises UserError."""
    began = time.monotonic()
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False)

    with SignalLatch() as latch:
        try:
            if any(_is_resume(each) for each in overrides):
                sweep, lock, ready = _reopened(overrides, say)
            else:
                sweep, lock, ready = _new(overrides, say)
        except KeyboardInterrupt:
            say(NOTHING_WRITTEN)
            return 0
        with lock:
            try:
                following = [member for member in sweep.members if member.state == "running"]
                if following or ready and _remote(ready[0].config):
                    from launch.sweep import jobs as sweep_jobs

                    sweep_jobs.run(sweep, ready, following, say)
                else:
                    _run_here(sweep, ready, console, latch)
            except KeyboardInterrupt:  # between two members: nothing runs
                for member in sweep.members:
                    if member.state == "running" and member.job is None:
                        sweep.mark(member, *settled(sweep, member))
            return _ended(sweep, console, began)


def _new(overrides: list[str], say: Callable[[str], None]) -> tuple[Sweep, TextIO, list[CheckedMember]]:
    """A sweep whose members have been checked, its folder made and locked."""
    swept, members = sweep_members.expand(overrides)
    first = _composed(members[0], members[0].overrides)
    sweep_members.name(swept, members, first.to_dict())
    ours = not (first.run.name or first.run.dir)
    name, folder = rundir.reserved(first.run)
    try:
        return _checked_all(Sweep(folder, name, overrides, swept, members, os.getcwd()), first, say)
    except (UserError, KeyboardInterrupt):
        if ours:
            with suppress(OSError):
                folder.rmdir()
                RUNS.rmdir()  # where nothing else is in it
        raise


def _checked_all(
    sweep: Sweep, first: RunConfig, say: Callable[[str], None]
) -> tuple[Sweep, TextIO, list[CheckedMember]]:
    """The sweep with its members checked, in its folder. Raises UserError."""
    folder, members = sweep.folder, sweep.members
    if (folder / FILE).exists():
        raise UserError(f"run.dir={folder}: already holds a sweep; continue it with {override('resume', folder)}")
    sizes = " x ".join(f"{len(key.values)} of {key.path}" for key in sweep.swept)
    say(f"sweep {folder}: {len(members):,} members ({sizes}), all checked before the first starts")
    ready = []
    for member in members:
        if (sweep.place(member) / "config.yaml").exists():
            raise UserError(f"run.dir={sweep.place(member)}: already holds a run")
        config = first if member is members[0] else _composed(member, member.overrides)
        ready.append(_checked(sweep, member, config))
    _one_place(ready)
    _, lock = rundir.claim(RunSettings(name=sweep.name, dir=str(folder)), resumed=False)
    sweep.save()
    sweep.tabulate()
    return sweep, lock, ready


def _reopened(overrides: list[str], say: Callable[[str], None]) -> tuple[Sweep, TextIO, list[CheckedMember]]:
    """A sweep to go on with: its unfinished members, checked. `running` ones are still followed on their cluster."""
    others = [each for each in overrides if not _is_resume(each)]
    for each in others:
        if each.lstrip("+~").partition("=")[0].split(".")[0] != "cluster":
            raise UserError(f"{each}: a resumed sweep takes resume=RUN and cluster keys only: its members are set")
    value = compose.composed([each for each in overrides if _is_resume(each)]).resume
    folder = next((f for f in (Path(value or ""), RUNS / (value or "")) if (f / FILE).exists()), None)
    if folder is None:
        known = sorted(path.parent.name for path in RUNS.glob(f"*/{FILE}"))
        has = f"; {RUNS}/ has {', '.join(known[-5:])}" if known else ""
        raise UserError(f"resume={value}: no such sweep; expected the folder of one{has}")
    _, lock = rundir.claim(RunSettings(dir=str(folder)), resumed=True)
    try:
        sweep = Sweep.load(folder)
        if sweep.here not in (None, os.getcwd()) and Path(str(sweep.here)).is_dir():
            sweep.folder = folder = folder.absolute()
            os.chdir(str(sweep.here))
        ready = []
        for member in sweep.members:
            if member.state not in OPEN or (state := _caught_up(sweep, member)) is None:
                continue
            member.state, member.reason = state
            if member.state != "done":
                ready.append(_checked_again(sweep, member, others))
        _one_place(ready)
        say(f"sweep {folder}: {len(ready):,} of {len(sweep.members):,} members to start or to resume")
        for one in ready:
            one.member.state, one.member.reason = "waiting", None
        sweep.save()
        sweep.tabulate()
        return sweep, lock, ready
    except BaseException:
        lock.close()
        raise


def _checked_again(sweep: Sweep, member: Member, others: list[str]) -> CheckedMember:
    """A member to resume from its folder, or to start where it has none."""
    folder = sweep.place(member)
    if (folder / "config.yaml").exists():
        return _checked(sweep, member, _composed(member, [*others, f"resume={quote(str(folder))}"]))
    ready = _checked(sweep, member, _composed(member, [*member.overrides, *others]))
    if _remote(ready.config) and member.job and member.state != "waiting":  # its folder is on the cluster
        return ready._replace(elsewhere=[*others, f"resume={quote(str(folder.absolute()))}"])
    return ready


def _composed(member: Member, overrides: list[str]) -> RunConfig:
    try:
        return configure(overrides)
    except UserError as error:
        raise UserError(f"member {member.number} ({member.words}): {error}") from None


def _checked(sweep: Sweep, member: Member, config: RunConfig) -> CheckedMember:
    """A member's configuration with its own name, folder and group, checked as far as that can be done from here."""
    if config.resume is None:
        run = RunSettings(name=f"{sweep.name}/{member.folder}", dir=str(sweep.place(member)))
        config = replace(config, run=run)
        if config.tracking.get("group", "") is None:
            config = replace(config, tracking=config.tracking.having(group=sweep.name))
    try:
        remote = _remote(config)
        check = submit.check if remote else check_run
        flight = check(config, lambda line: None)  # the run itself says it again
    except UserError as error:
        raise UserError(f"member {member.number} ({member.words}): {error}") from None
    return CheckedMember(member, flight.config, flight.device)


def _run_here(sweep: Sweep, ready: list[CheckedMember], console: Console, latch: SignalLatch) -> None:
    """One member after another, until a signal asks for the end."""
    for each in ready:
        sweep.mark(each.member, "running")
        console.print(f"[{each.member.number}/{len(sweep.members)}] {each.member.words}", style="bold", markup=False)
        try:
            state, reason = _one(sweep, each, console)
        except KeyboardInterrupt:
            state, reason = settled(sweep, each.member)
        sweep.mark(each.member, state, reason)
        if latch():
            return


def _one(sweep: Sweep, each: CheckedMember, console: Console) -> tuple[str, str | None]:
    """Runs a member to its end. Returns its state and, where it failed, why; nothing that it raises ends the sweep."""
    try:
        ended = run(each.config, console, brief=True)
    except UserError as error:
        state, reason = "failed", str(error)
    except Exception as error:
        with suppress(OSError), (sweep.folder / "error.txt").open("a", encoding="utf-8") as file:
            file.write(f"member {each.member.number}\n{traceback.format_exc()}\n")
        first = (str(error).strip().splitlines() or [""])[0]
        state, reason = "failed", f"{type(error).__name__}: {first} (full trace: {sweep.folder / 'error.txt'})"
    else:
        if ended.code == 0 and ended.stopped:
            return ("stopped" if ended.folder else "waiting"), None
        if ended.code == 0:
            return "done", None
        return "failed", ended.reason or f"exit code {ended.code}"
    console.print(f"failed: {reason}", markup=False)
    return state, reason


def settled(sweep: Sweep, member: Member) -> tuple[str, str | None]:
    """The state of a member that nothing runs any more, by its folder; as it was noted where that says nothing."""
    try:
        state = status.read(sweep.place(member), running=False).state
    except (OSError, ValueError, KeyError, TypeError, UserError):  # not begun, or not seen from here
        return ("waiting", None) if member.state == "running" else (member.state, member.reason)
    if state == "complete":
        return "done", None
    return ("failed", member.reason) if member.state == "failed" else ("stopped", None)


def _caught_up(sweep: Sweep, member: Member) -> tuple[str, str | None] | None:
    """The state of an unfinished member after the last sweep was left; None where it is a job that goes on."""
    if member.state != "running" or member.job is None:
        return settled(sweep, member)
    from launch.sweep import jobs as sweep_jobs

    cluster = Jobs(member.address)
    try:
        cluster.find(member.job)
    except UserError:  # a cluster that was started again knows none of its old jobs
        return settled(sweep, member)
    return sweep_jobs.end(sweep, member, cluster) if cluster.ended(member.job) else None


def _ended(sweep: Sweep, console: Console, began: float) -> int:
    """Prints and keeps the table and the plot, and says how to go on. Returns the exit code."""
    results = sweep.results()
    sweep.tabulate()
    sweep_table.show(sweep.swept, results)
    files = f"{sweep.folder}/table.txt, table.csv"
    try:
        from launch.sweep import plot as sweep_plot

        sweep_plot.draw(sweep.folder / PLOT, str(sweep.folder), sweep.swept, results)
        files += f", {PLOT}"
    except (Exception, KeyboardInterrupt) as error:  # a picture is not worth the exit code of a week
        console.print(f"no plot: {type(error).__name__}: {error}", markup=False)
    counts = {state: sum(member.state == state for member in sweep.members) for state in ("done", *OPEN)}
    text = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
    console.print(f"{text}; {duration(time.monotonic() - began)} in all. {files}", markup=False)
    if counts["done"] < len(sweep.members):
        console.print(
            f"{command('sweep', override('resume', sweep.folder))} goes on with what is not done", markup=False
        )
    return 1 if counts["failed"] else 0


def _is_resume(given: str) -> bool:
    return given.lstrip("+").startswith("resume=")


def _remote(config: RunConfig) -> bool:
    """Says whether a run is handed over to a cluster as a job."""
    return config.cluster.kind == "ray" and nodes.is_remote(nodes.address_of(config.cluster.address))


def _one_place(ready: list[CheckedMember]) -> None:
    """Refuses a sweep over clusters: who runs here waits for its turn, who is a job does not."""
    places = {nodes.address_of(e.config.cluster.address) if _remote(e.config) else "here" for e in ready}
    if len(places) > 1:
        raise UserError(f"cluster: the members would run at {', '.join(sorted(places))}; a sweep runs at one place")
