"""A world on Ray: the side that has Ray in it. It starts one, trains once on it, reports, and waits to be ended.

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
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from launch.outcome import Failure
from launch.world import SIGNALS, Job, TooFewDevicesError, leave_with_parent, loopback

_STORE_BYTES = 80_000_000  # Ray's object store: near its least (75 MiB), nothing of ours goes through it
_PEER_S = 2.0  # seconds that a rank which lost a peer keeps quiet

# Ray Train's, in the driver, the controller and the workers.
_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how late an end is noticed; 2 by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",  # 60 by default, too few on a busy machine
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "3600",  # a compilation may hold Python's lock for minutes
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
# Ray's own, inherited by all that it starts.
_RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # Ray listens on every interface, whatever address it is given
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_register_timeout_seconds": "180",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # after a failure, peers may hang in theirs; 30 by default
}


def scratch(run_dir: Path) -> Path:
    """Where a run on Ray keeps what is not the run's: reports of ranks, Ray Train's storage, the driver's log."""
    return run_dir / ".ray"


@dataclass(frozen=True)
class Report:
    """What the driver tells the launcher: all went well, or ranks failed, or else Ray itself did (`line`, `trace`)."""

    ok: bool
    failures: list[Failure] = field(default_factory=list)
    deaths: list[tuple[int, str]] = field(default_factory=list)
    line: str = ""
    trace: str = ""


def drive(job: Job, place: str, pipe: connection.Connection[Any, Any]) -> None:
    """The driver process, with Ray's files under `place`: sends one Report and stays until it is ended."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    log = os.open(scratch(job.run_dir) / "driver.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    leave_with_parent(job.run_dir)
    for foreign in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        os.environ.pop(foreign, None)
    os.environ.update(_TRAIN_ENVIRONMENT | _RAY_ENVIRONMENT | loopback() | _token(place))
    os.environ.update(OMP_NUM_THREADS=str(job.threads), PYTHONPATH=os.pathsep.join(job.path))
    try:
        report = _fit(job, place)
    except BaseException as error:
        failure = Failure.of(-1, error)
        report = Report(False, line=failure.line, trace=failure.trace)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(report)
        pipe.recv()
    # Here only when the launcher cannot end us by itself (see `launch.cluster`), or has died.
    import ray

    ray.shutdown()
    shutil.rmtree(place, ignore_errors=True)


def _token(place: str) -> dict[str, str]:
    """A secret of this run's own, in its private folder: in the home folder later clusters would trip over it."""
    path = Path(place) / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_TOKEN_PATH": str(path)}


def _fit(job: Job, place: str) -> Report:
    """Start Ray, train once, and tell how it went; raises what Ray itself fails with."""
    imports = threading.Thread(target=_import_ahead)
    imports.start()
    _start_ray(job, place)
    imports.join()
    import ray.train

    try:
        # Off the main thread: there, Ray's own SIGINT handler would be installed, which aborts the run.
        _off_main_thread(_trainer(job).fit)
    except ray.train.WorkerGroupError as error:
        failures = _reports(job)
        reported = {failure.rank for failure in failures}
        deaths = [(rank, _death(why)) for rank, why in sorted(error.worker_failures.items()) if rank not in reported]
        return Report(False, failures, deaths)
    return Report(True)


def _import_ahead() -> None:
    import ray.train.torch  # noqa: F401


def _start_ray(job: Job, place: str) -> None:
    import logging

    import ray

    ray.init(
        address="local",  # never one that runs already
        num_cpus=job.workers,
        num_gpus=job.workers if job.device == "cuda" else 0,
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Equal to what Ray Train gives to its controller and workers: the processes started in advance then fit them.
        runtime_env={"env_vars": _TRAIN_ENVIRONMENT},
        _node_ip_address="127.0.0.1",
        _temp_dir=place,
    )


def _trainer(job: Job) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        """Without the actors that hand out datasets and clean up on clusters: half a gigabyte, a second at the end."""

        def _create_default_callbacks(self) -> list[Any]:
            unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
            return [each for each in super()._create_default_callbacks() if type(each).__name__ not in unused]

    return Trainer(
        _work,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend=job.backend),
        scaling_config=ScalingConfig(
            num_workers=job.workers, use_gpu=job.device == "cuda", resources_per_worker={"CPU": 1}
        ),
        run_config=RunConfig(
            name="train", storage_path=str(scratch(job.run_dir)), failure_config=FailureConfig(max_failures=0)
        ),
    )


def _off_main_thread(function: Any) -> None:
    """Call `function` in a thread and raise what it raises."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _work(told: dict[str, Any]) -> None:
    """A Ray Train worker's life: torch.distributed is initialised; run the entry and leave the world together."""
    import torch
    import torch.distributed as dist

    job: Job = told["job"]
    rank = dist.get_rank()
    try:
        os.chdir(job.directory)
        torch.set_num_threads(job.threads)
        if job.device == "cuda" and torch.cuda.device_count() < 1:
            raise TooFewDevicesError(job.workers, 0)
        job.function()(job.config)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        failure = Failure.of(rank, error)
        path = scratch(job.run_dir) / f"rank-{rank}.json"
        path.with_suffix(".part").write_text(json.dumps(asdict(failure)), encoding="utf-8")
        path.with_suffix(".part").rename(path)
        if failure.blames_peer:
            time.sleep(_PEER_S)  # the controller stops at the first failure it hears of: let that be the culprit's
        # A plain one, for whatever the entry raised may not survive the way to the driver.
        raise RuntimeError(failure.line) from None


def _reports(job: Job) -> list[Failure]:
    """What the ranks wrote about their failures."""
    paths = sorted(scratch(job.run_dir).glob("rank-*.json"))
    return [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def _death(why: Exception) -> str:
    """How a rank ended that wrote nothing: Ray does not tell the signal."""
    if "low on memory" in str(why):
        return "was killed by Ray: the machine runs out of memory"
    return "was killed (SIGKILL, or a crash)"
