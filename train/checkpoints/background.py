"""A checkpoint that is written beside training.

The thread that trains copies this rank's tensors into memory of the CPU, which it uses again for the next checkpoint,
and goes on; a thread of this module writes the copy. Its collectives have a process group of their own, on gloo: those
of training would otherwise meet them in another order on another rank. A checkpoint is asked for, waited for and found
done at the same step on every rank, so that all of them go on, or fail, together.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.liveness import TIMEOUT
from parallel.shards import local
from train.checkpoints.pieces import LogicalTensor
from train.checkpoints.saving import Contents

Write = Callable[[Contents, dist.ProcessGroup], Path]
_LAST_S = 30.0  # that a failing rank waits for a checkpoint which is being written


class StateCopies:
    """Copies of state dicts on the CPU, in memory that is allocated once."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Any] = {}

    @torch.no_grad()
    def of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state dict of the same tensors, as they are now. Valid until the next call."""
        copied = self._copied(state, ())
        for device in {value.device for value in _tensors(state) if value.is_cuda}:
            torch.cuda.synchronize(device)
        return copied

    def _copied(self, node: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(node, Mapping):
            return {key: self._copied(value, (*path, key)) for key, value in node.items()}
        if not isinstance(node, Tensor):
            return node
        if (logical := getattr(node, "logical", None)) is not None:
            boxes = {at: self._memory((*path, at), box).copy_(box) for at, box in logical.held.items()}
            stand_in = torch.empty(0, dtype=node.dtype)  # torch takes state dicts of tensors alone
            stand_in.logical = LogicalTensor(logical.shape, boxes, logical.properties)  # type: ignore[attr-defined]
            return stand_in
        own = self._memory(path, local(node)).copy_(local(node), non_blocking=True)
        if not isinstance(node, DTensor):
            return own
        mesh, placements = node.device_mesh, node.placements
        return DTensor.from_local(own, mesh, placements, run_check=False, shape=node.shape, stride=node.stride())

    def _memory(self, path: tuple[Any, ...], like: Tensor) -> Tensor:
        memory = self._held.get(path)
        if memory is None or memory.shape != like.shape or memory.dtype != like.dtype:
            memory = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._held[path] = memory
        return memory


def _tensors(node: Any) -> list[Tensor]:
    if isinstance(node, Mapping):
        return [tensor for value in node.values() for tensor in _tensors(value)]
    return [local(node)] if isinstance(node, Tensor) else []


class Background:
    """Writes checkpoints in a thread, one at a time. Its methods are collective but `abandon`."""

    def __init__(self) -> None:
        self._copies = StateCopies()
        self._groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None

    @property
    def writing(self) -> bool:
        """True from `begin` until `ended` or `wait` has said how it went."""
        return self._thread is not None

    def begin(self, held: Contents, write: Write) -> None:
        """Copies the tensors, and has `write` make a checkpoint of the copy. None may be written at the moment."""
        assert self._thread is None
        if self._groups is None:
            world = list(range(dist.get_world_size()))
            self._groups = tuple(dist.new_group(world, timeout=TIMEOUT, backend="gloo") for _ in range(2))  # type: ignore[assignment]
        assert self._groups is not None
        copy, group = held._replace(state=self._copies.of(held.state)), self._groups[0]

        def run() -> None:
            try:
                self._path = write(copy, group)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        """Says whether the checkpoint that was begun is written, or has failed, on every rank."""
        assert self._thread is not None and self._groups is not None
        here = torch.tensor(0 if self._thread.is_alive() else 1)
        dist.all_reduce(here, op=dist.ReduceOp.MIN, group=self._groups[1])
        return bool(here)

    def wait(self) -> Path:
        """Returns the folder of the checkpoint that was begun, once it is complete. Raises what its writing has."""
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        path, error = self._path, self._error
        self._path = self._error = None
        if error is not None:
            raise error
        assert path is not None
        return path

    def abandon(self) -> Path | None:
        """Returns the folder of a checkpoint that comes to its end although this rank has failed; None where it does
        not within half a minute, or there is none."""
        thread, self._thread = self._thread, None
        if thread is None:
            return None
        thread.join(_LAST_S)
        return None if thread.is_alive() else self._path
