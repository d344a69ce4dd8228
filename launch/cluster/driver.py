"""A world on Ray: the side that has Ray in it. It starts or joins one, trains once, reports, and waits to be ended.

Most of a start is Python processes importing Ray and torch. What shortens it: Ray starts while this process imports;
one set of environment variables for the job, the controller and the workers, so that the processes which Ray starts
in advance fit; and no helper actors that a run on one machine has no use for.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from launch.cluster import inspection, package, rendezvous
from launch.cluster.package import TRAIN_ENVIRONMENT
from launch.errors import UserError
from launch.run.failure import MACHINE, Failure
from launch.run.signals import SIGNALS, stop_file
from launch.world.job import Job, leave_with_parent, loopback
from launch.world.watchdog import Watch

_STORE_BYTES = 80_000_000  # Ray's object store: near its least (75 MiB), nothing of ours goes through it
_PEER_S = 2.0  # seconds that a rank which lost a peer keeps quiet
_JOIN_S = 5.0  # seconds between two attempts to join a Ray
HEAD = "head"  # in the scratch folder: the address of the head of the Ray that was joined
HEAD_LOST = f"was lost {MACHINE}, that of the head of Ray"
_MEMBERS = "members.json"  # in the scratch folder: where the ranks of this attempt are

# Ray's own, inherited by all that it starts.
_RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    # Ray replaces the loopback address by the machine's own, and then listens on every interface; not where it is told
    # to reckon with no other machine, by a name that speaks of the systems where that is the default.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_register_timeout_seconds": "180",
    "RAY_worker_niceness": "0",  # by default 15: any other program on the machine goes before training
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # after a failure, peers may hang in theirs; 30 by default
}


def scratch(run_dir: Path) -> Path:
    """Returns where a run on Ray keeps what is not the run's: reports of ranks, Ray Train's storage, the driver's
    log."""
    return run_dir / ".ray"


@dataclass(frozen=True)
class Report:
    """The driver's word to the launcher: all went well, or ranks failed, or else Ray itself did (`line`, `trace`)."""

    ok: bool
    failures: list[Failure] = field(default_factory=list)
    deaths: list[tuple[int, str]] = field(default_factory=list)
    line: str = ""
    trace: str = ""


def drive(job: Job, place: str, pipe: connection.Connection[Any, Any]) -> None:
    """The driver process, with Ray's files under `place`: sends lines for people, then one Report, and stays until it

    is ended.
    """
    os.setsid()
    if job.address is None:
        for number in SIGNALS:  # one that came before we had a session of our own was the launcher's: forgotten
            before = signal.signal(number, signal.SIG_IGN)
            signal.signal(number, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # else Ray's job agent sends them here too: still held back
    log = os.open(scratch(job.run_dir) / "driver.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    leave_with_parent(job.run_dir)
    os.environ.update(TRAIN_ENVIRONMENT)
    if job.address is None:
        for foreign in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
            os.environ.pop(foreign, None)
        os.environ.update(_RAY_ENVIRONMENT | loopback() | _token(place))
        os.environ.update(OMP_NUM_THREADS=str(job.threads), PYTHONPATH=os.pathsep.join(job.path))
        os.chdir(place)  # Ray puts its driver's folder on the path of the workers
    try:
        report = _fit(job, place, pipe.send)
    except BaseException as error:
        failure = Failure.of(-1, error)
        report = Report(False, [failure] if failure.user_line else [], line=failure.line, trace=failure.trace)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(report)
        pipe.recv()
    # Here when the launcher cannot end us by itself (see `launch.cluster.controller`), has died, or Ray is not ours to
    # kill.
    import ray

    ray.shutdown()
    shutil.rmtree(place, ignore_errors=True)


def _token(place: str) -> dict[str, str]:
    """A secret of this run's own, in its private folder: in the home folder later clusters would trip over it."""
    path = Path(place) / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_TOKEN_PATH": str(path)}


def _fit(job: Job, place: str, say: Callable[[str], None]) -> Report:
    """Start or join Ray, train once, and tell how it went; raises what Ray itself fails with."""
    imports = threading.Thread(target=_import_ahead)
    imports.start()
    if job.address is None:
        _start_ray(job, place)
    else:
        imports.join()  # joining takes no time that could be used, and torch's import beside it has crashed
        if not _join_ray(job, say):
            return Report(True)
        if not inspection.inspect_machines(job, say):
            return Report(True)  # a stop was asked for while the run waited for its turn
    imports.join()
    import ray.train

    try:
        # Off the main thread: there, Ray's own SIGINT handler would be installed, which aborts the run.
        if not _off_main_thread(_trainer(job).fit, meanwhile=lambda: any(f.stopped for f in _reports(job))):
            # Ray would wait for the worker that does not answer.
            return Report(False, _reports(job), list(_lost_with_machines(job, _members(job)).items()))
    except ray.train.WorkerGroupError as error:
        failures = _reports(job)
        members = _members(job)
        lost = _lost_with_machines(job, members)
        ranks = {members[ours]["rank"] if ours in members else ours: ours for ours in error.worker_failures}
        reported = {failure.rank for failure in failures}
        deaths = [
            (rank, _death(error.worker_failures[ours], members.get(ours)))
            for rank, ours in sorted(ranks.items())
            if rank not in reported and rank not in lost
        ]
        deaths = [(rank, how) for rank, how in lost.items() if rank not in reported] + deaths
        return Report(False, failures, deaths)
    return Report(True)


def _import_ahead() -> None:
    import ray.train.torch  # noqa: F401


def _start_ray(job: Job, place: str) -> None:
    import logging

    import ray

    sessions = Path(place) / "ray"  # which Ray makes writable to all: below a folder that is private
    ray.init(
        address="local",  # never one that runs already
        num_cpus=job.workers,
        num_gpus=job.workers if job.device == "cuda" else 0,
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Equal to what Ray Train gives to its controller and workers: the processes started in advance then fit them.
        runtime_env={"env_vars": TRAIN_ENVIRONMENT},
        _node_ip_address="127.0.0.1",
        _temp_dir=str(sessions),
    )


def _join_ray(job: Job, say: Callable[[str], None]) -> bool:
    """Become a driver of the Ray that runs at job.address, with our code for its workers. Raises UserError.

    A patient job waits for a Ray that was lost: False where a stop was asked for meanwhile.
    """
    import logging

    import ray

    assert job.address is not None
    # A submitted job's own code is deleted when its first driver ends: every attempt brings it again.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    announced = False
    while True:
        try:
            ray.init(
                address=job.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": package.environment(), "working_dir": job.code},
            )
            (scratch(job.run_dir) / HEAD).write_text(ray.get_runtime_context().gcs_address, encoding="utf-8")
            return True
        except Exception as error:
            if not job.patient and not isinstance(error, ConnectionError):
                raise
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            line = f"cluster.address={job.address}: no Ray to join from this machine ({line[:200]})"
            if not job.patient:
                raise UserError(line) from None
        if not announced:
            say(f"waiting for Ray: {line}")
        announced = True
        ray.shutdown()
        time.sleep(_JOIN_S)
        if stop_file(job.run_dir).exists():
            return False


def _no_retries() -> dict[str, int]:
    """Every limit of Ray Train's own retries, at 0: a machine that is taken away politely counts apart from a lost one,
    and by default is waited for without end and without a word. `launch.runner.attempts` decides, and says so."""
    from dataclasses import fields

    from ray.train import FailureConfig

    limits = ("max_failures", "max_preemption_failures", "controller_failure_limit")
    return {field.name: 0 for field in fields(FailureConfig) if field.name in limits}


def _trainer(job: Job) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend, BackendConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class RendezvousBackend(TorchConfig):
        """Leaves the process group to `launch.cluster.rendezvous`, which numbers the ranks by machine."""

        @property
        def backend_cls(self) -> type[Backend[BackendConfig]]:
            return Backend

    class LeanTrainer(TorchTrainer):
        """Without the actors that hand out datasets and clean up on clusters: half a gigabyte, a second at the end."""

        def _create_default_callbacks(self) -> list[Any]:
            unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
            return [each for each in super()._create_default_callbacks() if type(each).__name__ not in unused]

    return LeanTrainer(
        _work,
        train_loop_config={"job": job},
        torch_config=RendezvousBackend(backend=job.backend),
        scaling_config=ScalingConfig(
            num_workers=job.workers, use_gpu=job.device == "cuda", resources_per_worker={"CPU": 1}
        ),
        run_config=RunConfig(
            name="train", storage_path=str(scratch(job.run_dir)), failure_config=FailureConfig(**_no_retries())
        ),
    )


def _off_main_thread(function: Any, *, meanwhile: Callable[[], bool]) -> bool:
    """Call `function` in a thread and raise what it raises. False where it was left to itself: `meanwhile` was true."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
        if meanwhile():
            return False
    if errors:
        raise errors[0]
    return True


def _work(message: dict[str, Any]) -> None:
    """A Ray Train worker's life: enter the world, run the entry, and leave the world together."""
    import ray.train
    import torch.distributed as dist

    job: Job = message["job"]
    rank = ours = ray.train.get_context().get_world_rank()
    try:
        if job.address is None:
            os.chdir(job.directory)
        rank, host, port, keeper = rendezvous.enter(job, scratch(job.run_dir) / _MEMBERS)
        with Watch(rank, job.workers, host, port, lambda failure: _tell(job, ours, failure), keeper=keeper) as watch:
            job.function()(job.config)
            watch.leave()
        dist.destroy_process_group()
    except BaseException as error:
        failure = Failure.of(rank, error)
        _tell(job, ours, failure)
        if failure.blames_peer:
            time.sleep(_PEER_S)  # the controller stops at the first failure it hears of: let that be the culprit's
        # A plain one, for whatever the entry raised may not survive the way to the driver.
        raise RuntimeError(failure.line) from None


def _tell(job: Job, ours: int, failure: Failure) -> None:
    """A rank's report, in a file of Ray's rank `ours`."""
    path = scratch(job.run_dir) / f"rank-{ours}.json"
    path.with_suffix(".part").write_text(json.dumps(asdict(failure)), encoding="utf-8")
    path.with_suffix(".part").rename(path)


def _reports(job: Job) -> list[Failure]:
    """Returns what the ranks wrote about their failures."""
    paths = sorted(scratch(job.run_dir).glob("rank-*.json"))
    return [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def _members(job: Job) -> dict[int, dict[str, Any]]:
    """Ray's rank of each worker that entered the world -> its rank and its machine's address."""
    try:
        members = json.loads((scratch(job.run_dir) / _MEMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {member["ray_rank"]: {**member, "rank": rank} for rank, member in enumerate(members)}


def _lost_with_machines(job: Job, members: dict[int, dict[str, Any]]) -> dict[int, str]:
    """The ranks whose machine is gone, and what to say of each: Ray itself finds out later.

    A machine is gone where Ray's own process there accepts no connection.
    """
    import ray

    if job.address is None or not members:
        return {}
    if not head_answers(job.run_dir):  # without it Ray knows of no machine
        return {min(member["rank"] for member in members.values()): HEAD_LOST}
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    gone = {
        id
        for id in {member["node"] for member in members.values()}
        if id not in nodes
        or not nodes[id]["Alive"]
        or not inspection.answers(nodes[id]["NodeManagerAddress"], nodes[id]["NodeManagerPort"])
    }
    lost = [member for member in members.values() if member["node"] in gone]
    return {
        member["rank"]: f"was lost {MACHINE}, {inspection.name_of(nodes[member['node']])}"
        if member["node"] in nodes
        else f"was lost {MACHINE} on {member['address']}"
        for member in sorted(lost, key=lambda member: member["rank"])
    }


def head_answers(run_dir: Path) -> bool:
    """Says whether the head of the Ray that a run has joined accepts connections; True where none was joined."""
    try:
        host, _, port = (scratch(run_dir) / HEAD).read_text(encoding="utf-8").rpartition(":")
        return inspection.answers(host.strip("[]"), int(port))
    except (OSError, ValueError):
        return True


def _death(why: Exception, member: dict[str, Any] | None) -> str:
    """Returns how a silent rank ended, and on which machine of a cluster: Ray does not tell the signal."""
    where = f" on {member['address']}" if member and member["address"] != "127.0.0.1" else ""
    if "low on memory" in str(why):
        return f"was killed by Ray{where}: the machine runs out of memory"
    if "its node has died" in str(why):
        return f"was lost {MACHINE}{where}"
    return f"was killed{where} (SIGKILL, or a crash)"
