"""Looking at a cluster's machines before a run starts on them: versions, the run folder, room.

What is wrong is a UserError: one line that names the key, what was asked, what is there, machine by machine.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launch.cluster import package
from launch.cluster.placement import Node, Placement, place
from launch.errors import UserError
from launch.run.signals import stop_file
from launch.world.job import Job

PASSED = "checks passed: "  # opens the line that is said when they have
_LOOK_S = 60.0  # seconds that a machine may take to answer: its first process of ours has to start
_ANSWER_S = 3.0  # seconds that a live machine may take to accept a connection
_TURN_S = 2.0  # seconds between two looks at what is free
_COMPARED = ("python", "ray", "torch")


@dataclass(frozen=True)
class Sight:
    """The view of a process on one machine. folder: what is wrong with the run folder there, or None. lacks: what is
    missing there, or None."""

    python: str
    ray: str
    torch: str
    folder: str | None
    lacks: str | None = None


def look(folder: str, token: str, mark: str) -> Sight:
    """This machine's versions, and whether it shares `folder`: it must hold `token`, and take a file named `mark`."""
    there = _folder(Path(folder), token, mark)
    return Sight(platform.python_version(), _version("ray"), _version("torch"), there, package.missing())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _folder(folder: Path, token: str, mark: str) -> str | None:
    try:
        if not (folder / token).exists():
            return "does not see the run folder of the others"
        (folder / mark).touch()
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return None


def inspect_machines(job: Job, say: Callable[[str], None]) -> bool:
    """Look at every machine that has room for a worker, and wait until there is room for all.

    False when a stop was asked for while waiting. Raises UserError.
    """
    message = ""
    while True:
        placement, ids = _place(job, say)
        if placement is None:
            return False
        try:
            same = _compare(job, ids)
            break
        except UserError as error:  # a machine that was lost just now, or one that has come and is not ready yet
            if not job.patient:
                raise
            if str(error) != message:
                message = str(error)
                say(f"waiting for machines: {message}")
        if _stopped(job):
            return False
    count = len(placement.nodes)
    say(
        f"{PASSED}{job.workers} workers on {count} machine{'s' if count > 1 else ''}, all with Python {same.python}, "
        f"Ray {same.ray}, torch {same.torch}; {'; '.join(placement.lines()[count:]) or 'one worker'}"
    )
    return _wait(job, say)


def _place(job: Job, say: Callable[[str], None]) -> tuple[Placement | None, list[str]]:
    """The placement and Ray's ids of the machines with room; None when a stop was asked for while waiting for them."""
    message = ""
    while True:
        machines = _machines(job.device, say)
        try:
            return place(job.workers, [node for _, node in machines], job.sizes), [each for each, _ in machines]
        except ValueError as error:
            if not job.patient:
                raise UserError(str(error)) from None
            if str(error) != message:
                message = str(error)
                say(f"waiting for machines: {message}")
        if _stopped(job):
            return None, []


def _stopped(job: Job) -> bool:
    """Says whether a stop was asked for, now or in a moment."""
    time.sleep(_TURN_S)
    return stop_file(job.run_dir).exists()


def _machines(device: str, say: Callable[[str], None]) -> list[tuple[str, Node]]:
    """(Ray's node id, what `place` needs) of every live machine with room for a worker on `device`.

    A machine that has just died is alive to Ray for some time yet, and its cores are free: we wait until Ray knows.
    """
    import ray

    deadline, announced = time.monotonic() + _LOOK_S, False
    while True:
        alive = [node for node in ray.nodes() if node["Alive"]]
        lost = [node for node in alive if not answers(node["NodeManagerAddress"], node["NodeManagerPort"])]
        if not lost or time.monotonic() > deadline:
            break
        if not announced:
            say(f"a machine was lost: {', '.join(name_of(node) for node in lost)}; waiting until Ray has found out")
        announced = True
        time.sleep(_TURN_S)
    machines = []
    for node in alive:
        slots = int(node["Resources"].get("GPU" if device == "cuda" else "CPU", 0))
        if slots and node not in lost:
            machines.append((node["NodeID"], Node(node["NodeName"], node["NodeManagerAddress"], slots)))
    return machines


def answers(host: str, port: int) -> bool:
    """Says whether something listens at an address: Ray's own process of a machine, say, which dies with it."""
    try:
        socket.create_connection((host, port), _ANSWER_S).close()
    except OSError:
        return False
    return True


def name_of(node: dict[str, Any]) -> str:
    """A machine for people: its name, and the beginning of Ray's id, which tells several on one machine apart."""
    return f"{node['NodeName']} ({node['NodeID'][:6]})"


def _compare(job: Job, ids: list[str]) -> Sight:
    """Run `look` on every machine at once, and hold what they say against each other. Raises UserError."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = job.run_dir / ".ray"
    token = f"shared-{os.urandom(8).hex()}"
    (folder / token).touch()
    names = {node["NodeID"]: name_of(node) for node in ray.nodes()}
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    sights_by_host = {
        each: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(each, soft=False)).remote(
            str(folder), token, f"{token}-{each[:12]}"
        )
        for each in ids
    }
    here = Sight(platform.python_version(), _version("ray"), _version("torch"), None)
    sights: dict[str, Sight] = {"the driver": here}
    for each, answer in sights_by_host.items():
        try:
            sights[names[each]] = ray.get(answer, timeout=_LOOK_S)
        except Exception as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            if isinstance(error, ray.exceptions.TaskUnschedulableError | ray.exceptions.NodeDiedError):
                raise UserError(f"cluster.address: {names[each]} was lost while it was looked at") from None
            raise UserError(f"cluster.address: {names[each]} does not run our code ({line[:200]})") from None
    for name, sight in sights.items():
        if sight.lacks:
            raise UserError(f"cluster.address: {name}: {sight.lacks}")
    difference(sights)
    for name, sight in sights.items():
        if sight.folder:
            raise UserError(
                f"run.dir={job.run_dir}: {name} {sight.folder}; expected a folder on a file system that all "
                "machines share"
            )
    unseen = [names[each] for each in ids if not (folder / f"{token}-{each[:12]}").exists()]
    for mark in folder.glob(f"{token}*"):
        mark.unlink(missing_ok=True)
    if unseen:
        raise UserError(
            f"run.dir={job.run_dir}: what {unseen[0]} writes there is not seen here; expected a folder on a file "
            "system that all machines share"
        )
    return here


def difference(sights: dict[str, Sight]) -> None:
    """Raises UserError, naming the first package whose versions differ, with the machines that have each."""
    for compared in _COMPARED:
        differences: dict[str, list[str]] = {}
        for name, sight in sights.items():
            differences.setdefault(asdict(sight)[compared], []).append(name)
        if len(differences) > 1:
            each = "; ".join(f"{which} on {', '.join(names)}" for which, names in differences.items())
            raise UserError(f"cluster: versions of {compared} differ between machines: {each}; they must be the same")


def _wait(job: Job, say: Callable[[str], None]) -> bool:
    """Wait until the workers fit into what other jobs leave; False when a stop was asked for."""
    import ray

    kind = "GPU" if job.device == "cuda" else "CPU"
    last: Any = None
    while (free := int(ray.available_resources().get(kind, 0))) < job.workers:
        if stop_file(job.run_dir).exists():
            return False
        if free != last:
            say(f"waiting for {job.workers} workers: {free} {kind}s are free")
            last = free
        time.sleep(_TURN_S)
    return True
