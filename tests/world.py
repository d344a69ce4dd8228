"""Small gloo worlds for tests. See conftest."""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests.late_imports import LATE

_context = multiprocessing.get_context("forkserver")
_PRELOAD = ("torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "parallel.parallelize")
_DRAWS = ("matplotlib.figure", "matplotlib.backends.backend_agg")  # a corpus's card
_TESTS = (
    "pytest",
    "hypothesis",
    "launch.config.compose",
    "tests.parity",
    "tests.jobs",
)  # of the functions that ranks run
# The last one: what the others have made is looked through no more, in no rank.
_MODULES = (*_PRELOAD, *_DRAWS, "torch.utils.flop_counter", "train.build", *LATE, *_TESTS, "tests.frozen")
_context.set_forkserver_preload(list(_MODULES))


def run_world(
    world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120, backend: str = "gloo", **kwargs: Any
) -> list[Any]:
    """fn(*args, **kwargs) on each of `world` ranks with torch.distributed initialised; returns results by rank.

    The backend is gloo, or nccl with a GPU a rank. `fn` and its arguments must pickle. Raises AssertionError with the
    first traceback if a rank fails or time runs out.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(world):
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank, args=(rank, world, store.port, there, backend, fn, args, kwargs), daemon=True
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    deadline = time.monotonic() + timeout
    results: list[Any] = [None] * world
    try:
        waiting = dict(enumerate(pipes))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise AssertionError(f"ranks {sorted(waiting)} of {world} still run after {timeout} s")
            for rank, pipe in list(waiting.items()):
                if pipe in ready:
                    del waiting[rank]
                    try:
                        ok, value = pipe.recv()
                    except EOFError:
                        raise AssertionError(f"rank {rank} of {world} died") from None
                    if not ok:
                        raise AssertionError(f"rank {rank} of {world} failed:\n{value}")
                    results[rank] = value
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return results


def _rank(
    rank: int, world: int, port: int, pipe: Any, backend: str, fn: Callable[..., Any], args: tuple, kwargs: dict
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, world, False)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        value = fn(*args, **kwargs)
        dist.barrier()
        pipe.send((True, value))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
