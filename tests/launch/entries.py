"""What the launcher tests run in their workers."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.world.watchdog import Watch
from parallel.collectives import Comm
from parallel.liveness import HERE, Liveness, Wait
from train.guards.hang_timeout import Patience


class UserError(Exception):
    """A user's mistake, as the real parts raise it."""

    user_line = "train.tokens: got -1, needs at least 1"


def __getattr__(name: str) -> Any:
    """An entry that takes for ever to import."""
    if name == "slow_to_import":
        time.sleep(600)
    raise AttributeError(name)


def _note(config: dict[str, Any], name: str, text: object) -> None:
    (Path(config["dir"]) / f"{name}-{dist.get_rank()}").write_text(str(text))


def _sum() -> float:
    x = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(x)
    return x.item()


def add(config: dict[str, Any]) -> None:
    """Note the time of entry, the sum over ranks, and what the world looks like."""
    _note(config, "entered", time.time())
    _note(config, "sum", _sum())
    threads = f"{torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}"
    _note(config, "threads", f"{threads} {dist.get_backend()} {os.nice(0)}")
    _note(config, "pid", os.getpid())
    _note(config, "left", time.time())


def surroundings(config: dict[str, Any]) -> None:
    """Note one environment variable and the working directory."""
    _note(config, "environ", os.environ["FARSPAN_TEST_NOTE"])
    _note(config, "directory", os.getcwd())


def fail(config: dict[str, Any]) -> None:
    """Rank 1 raises; the others wait for it in a collective."""
    _sum()
    if dist.get_rank() == 1:
        raise ValueError("the loss is a banana\nwith a second line")
    _sum()


def mistake(config: dict[str, Any]) -> None:
    """Every rank finds the user's mistake."""
    raise UserError("details that nobody asked for")


def die(config: dict[str, Any]) -> None:
    """Rank 1 is killed; the others wait for it in a collective."""
    _sum()
    _note(config, "pid", os.getpid())
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _sum()


def leave(config: dict[str, Any]) -> None:
    """Rank 1 leaves without a word."""
    if dist.get_rank() == 1:
        os._exit(3)
    _sum()


def steps(config: dict[str, Any]) -> None:
    """Take steps until told to stop, as training does; note how many were taken."""
    _note(config, "pid", os.getpid())
    for step in range(6000):
        stop = torch.tensor([float((Path(config["dir"]) / "stop").exists())])
        dist.all_reduce(stop)
        if stop.item():
            _note(config, "stopped", step)
            return
        time.sleep(0.02)


def add_and_step(config: dict[str, Any]) -> None:
    """Both."""
    print("a worker's own words stay off the terminal")
    add(config)
    steps(config)


def _rounds(config: dict[str, Any], stop_at: int, stop: Callable[[], None]) -> None:
    """Collectives for a layer each; rank 1 stops before the third. Patient until then: a first one may take seconds."""
    rank, size = dist.get_rank(), dist.get_world_size()
    comm = Comm(tuple(range(size)), rank, dist.group.WORLD)
    _note(config, "pid", os.getpid())
    for layer in range(1000):
        if layer == 2:
            HERE.patience = 3.0
            time.sleep(0.8)  # until each has told where it is
        if rank == config.get("culprit", 1) and layer == stop_at:
            _note(config, "stopped", time.monotonic())
            stop()
        replace(comm, layer=f"layers.{layer}").all_gather(torch.ones(2), purpose="state")


def freeze(config: dict[str, Any]) -> None:
    """A rank is frozen by a signal that nothing in it can hear."""
    _rounds(config, 3, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def freeze_host(config: dict[str, Any]) -> None:
    """The same of rank 0, which hosts the store."""
    freeze({**config, "culprit": 0})


def freeze_keeper(config: dict[str, Any]) -> None:
    """Of three ranks the last one, which keeps the store of a watch of ours, as after the renumbering on Ray."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False) if rank == 2 else None
    port: list[Any] = [own.port if own else None]
    dist.broadcast_object_list(port, src=2)
    here = Liveness()
    _note(config, "pid", os.getpid())
    with Watch(rank, size, "127.0.0.1", port[0], lambda f: _note(config, "line", f.line), here, keeper=2):
        here.patience = 3.0
        time.sleep(1.0)
        if rank == 2:
            _note(config, "stopped", time.monotonic())
            os.kill(os.getpid(), signal.SIGSTOP)
        with here.waiting(Wait("layers.3", "state", "all-gather")):
            time.sleep(600)


def freeze_saving(config: dict[str, Any]) -> None:
    """A rank is frozen inside a checkpoint, in which ranks are patient with each other as long as they run."""
    _note(config, "pid", os.getpid())
    patience = Patience(3.0, HERE)
    patience.stepped(0.1)
    patience.stepped(0.1)
    with patience.during("writing a checkpoint"):
        time.sleep(1.0)
        if dist.get_rank() == 1:
            _note(config, "stopped", time.monotonic())
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


def busy(config: dict[str, Any]) -> None:
    """A rank is alive and never comes."""
    _rounds(config, 3, lambda: time.sleep(600))


def pause(config: dict[str, Any]) -> None:
    """All ranks are frozen for longer than they are patient, and go on, as after Ctrl-Z."""
    HERE.patience = 1.0
    _note(config, "pid", os.getpid())
    _sum()
    pid = os.getpid()
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -STOP {pid}; sleep 4; kill -CONT {pid}"])
    time.sleep(1.5)
    _sum()
    time.sleep(0.2)
    HERE.patience = None


def stuck(config: dict[str, Any]) -> None:
    """Never look at the stop file."""
    _note(config, "pid", os.getpid())
    time.sleep(600)


def inherited(config: dict[str, Any]) -> None:
    """Note what there is of the launcher: its torch, its open file, how often circles are looked for; and a sum that
    several threads make."""
    torch_of = "forked" if hasattr(torch, "launchers") else "fresh"
    place = Path(f"/proc/self/fd/{config['file']}")
    leads = os.readlink(place) if place.exists() else "nowhere"
    total = torch.full((1_000_000,), 0.5).mul(1.0).sum().item()
    _note(config, "inherited", f"{torch_of} {leads} {gc.get_threshold()[0]} {gc.get_freeze_count() > 0} {total}")
