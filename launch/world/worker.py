"""A spawned worker's life: the other end of `launch.world.spawn`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from multiprocessing import connection
from typing import Any

from launch.run.failure import Failure
from launch.run.signals import SIGNALS, stop_file
from launch.world.job import Job, TooFewDevicesError, leave_with_parent, loopback
from launch.world.watchdog import Watch
from parallel.liveness import TIMEOUT


def work(
    job: Job,
    rank: int,
    port: int,
    listener: socket.socket | None,
    environ: dict[str, str],
    pipe: connection.Connection[Any, Any],
) -> None:
    """Run `job` as `rank` of the world whose store is at `port`; what happens is told through `pipe`.

    The words are "entered", "done" or a Failure; rank 0, which got the store's `listener`, then waits to be told to go.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: stop_file(job.run_dir).touch())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    leave_with_parent(job.run_dir)
    try:
        os.environ.clear()  # the fork server's is as old as the server
        os.environ.update(environ, **_coordinates(job, rank, port))
        os.chdir(job.directory)
        _enter(job, rank, port, listener, pipe)
        pipe.send("done")
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send(Failure.of(rank, error))
        sys.exit(1)
    if rank == 0:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()  # "leave"


def _enter(
    job: Job, rank: int, port: int, listener: socket.socket | None, pipe: connection.Connection[Any, Any]
) -> None:
    """Join the world, run the entry, and leave the world together."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(job.threads or 1)
    function = job.function()
    if job.device == "cuda":
        if torch.cuda.device_count() < job.workers:
            raise TooFewDevicesError(job.workers, torch.cuda.device_count())
        torch.cuda.set_device(rank)
    fd = listener.detach() if listener is not None else None
    store = dist.TCPStore(
        "127.0.0.1", port, job.workers, is_master=rank == 0, wait_for_workers=False, master_listen_fd=fd
    )
    dist.init_process_group(job.backend, store=store, rank=rank, world_size=job.workers, timeout=TIMEOUT)
    pipe.send("entered")
    with Watch(rank, job.workers, "127.0.0.1", store.port, pipe.send) as watch:
        function(job.config)
        watch.leave()
    dist.destroy_process_group()


def _coordinates(job: Job, rank: int, port: int) -> dict[str, str]:
    """Sets what torchrun and Ray would have set: libraries look for it."""
    size = str(job.workers)
    return loopback() | {
        "OMP_NUM_THREADS": str(job.threads or 1),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
