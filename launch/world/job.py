"""A worker's order, and its work around the entry: the same for spawned processes and on Ray."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

from launch import apart
from launch.run.signals import SIGNALS, stop_file

_ORPHAN_S = 60.0  # seconds an orphaned worker has to save and return before it leaves by itself


@dataclass(frozen=True)
class Job:
    """One world to run; it crosses process borders, and carries the caller's directory and import path with it."""

    entry: str
    config: dict[str, Any]
    workers: int
    run_dir: Path
    device: str
    threads: int | None  # None: this machine's cores, divided among the workers on it
    address: str | None = None  # of a Ray to join; None: one of our own
    patient: bool = False  # wait for machines that a cluster lacks, instead of refusing the run
    sizes: dict[str, int] = field(default_factory=dict)  # of the mesh, outermost first, to place its groups
    code: str | None = None  # the folder of farspan's packages that a joined Ray's workers get
    directory: str = field(default_factory=os.getcwd)
    path: list[str] = field(default_factory=lambda: apart.clean(sys.path))

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers: got {self.workers}, needs at least 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: got {self.threads}, needs at least 1")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device: got {self.device!r}, accepts 'cpu' or 'cuda'")
        if self.entry.count(":") != 1:
            raise ValueError(f"entry: got {self.entry!r}, needs 'module:function'")

    def function(self) -> Callable[[dict[str, Any]], Any]:
        """The entry itself, imported here. Raises ImportError or AttributeError."""
        module, name = self.entry.split(":")
        function: Callable[[dict[str, Any]], Any] = getattr(importlib.import_module(module), name)
        return function

    @property
    def backend(self) -> str:
        """torch.distributed's for the device, and a GPU's host, where `engine.offload_optimizer` clips gradients."""
        return "cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo"


class TooFewDevicesError(Exception):
    """More workers than CUDA devices: a user's mistake, told in one line."""

    def __init__(self, workers: int, devices: int) -> None:
        plural = "" if devices == 1 else "s"
        self.user_line = f"cluster.workers: got {workers}, but this machine has {devices} CUDA device{plural}"
        super().__init__(self.user_line)


def loopback() -> dict[str, str]:
    """The environment that keeps gloo on the loopback interface, where there is one of that name (Linux).

    Without it gloo asks for the address of the host's name, which may be unknown or lead outside.
    """
    return {"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Start a process that does not import our caller's `__main__` again: a script may lack the guard, and it costs."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Start a process with SIGNALS blocked, until it is ready for them; we get ours afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # which the tracker does not ignore by itself
    resource_tracker.ensure_running()  # it lifts the others when it starts, so they come after it
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_with_parent(run_dir: Path) -> None:
    """Watch, in a thread, for the death of the launching process: then ask to stop, and after a minute leave anyway."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        with contextlib.suppress(OSError):
            stop_file(run_dir).touch()
        time.sleep(_ORPHAN_S)
        os._exit(1)

    threading.Thread(target=watch, name="leave-with-parent", daemon=True).start()
