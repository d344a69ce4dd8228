"""The time and the memory of a step, by their use."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a process may ask for its peak of memory without loading torch
    import numpy as np
    import torch

    from models.accounting import Account

PHASES = ("data", "plan", "forward", "backward", "optimizer", "evaluate", "checkpoint", "logging", "wait")


class PhaseTimes:
    """Exclusive wall time of each named phase, in seconds.

    One clock runs at a time: entering a phase stops that of the phase around it until the inner one ends. The phases
    of a step therefore add up to the time spent inside any of them, and none is counted twice.

        with phases("backward"):
            ...
            with phases("wait"):      # not part of "backward"
                work.wait()

    One object belongs to one thread of control. An enter and its exit cost about 0.5 µs together.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._open: list[str] = []
        self._since = 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phases = {name: _Phase(self, name) for name in PHASES}

    def __call__(self, name: str) -> _Phase:
        """The context in which time counts as `name`'s. Raises ValueError where `name` is not one of PHASES."""
        try:
            return self._phases[name]
        except KeyError:
            raise ValueError(f"phase {name!r}: one of {', '.join(PHASES)}") from None

    def take(self) -> dict[str, float]:
        """The seconds of every phase since the last call, zeros included; counting starts afresh.

        Inside an open phase, the time it has spent so far belongs to this call and the rest to the next one.
        """
        self._charge()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def spent(self, name: str) -> float:
        """The seconds of a phase since `take`, without those of one that is open now."""
        return self._seconds[name]

    def _charge(self) -> None:
        """Give the time since the last change to the innermost open phase."""
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now


class _Phase:
    """One name's context: without state of its own, so it is made once and may be nested in itself."""

    __slots__ = ("_name", "_phases")

    def __init__(self, phases: PhaseTimes, name: str):
        self._phases = phases
        self._name = name

    def __enter__(self) -> None:
        self._phases._charge()
        self._phases._open.append(self._name)

    def __exit__(self, *exception: object) -> None:
        self._phases._charge()
        self._phases._open.pop()


def peak_memory_bytes(device: str) -> int:
    """The most memory held so far, in bytes: allocated tensors on a CUDA device ("cuda:0"), else this process's RSS.

    On Linux the peak is read from /proc, because `ru_maxrss` there survives fork and exec: a fresh worker would report
    the peak of the larger process that launched it.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def matmul_peak(device: str, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """FLOP/s of this process's best product of two square matrices in about `seconds`; draws no random number."""
    import torch

    on_gpu = device.startswith("cuda")
    size = 8192 if on_gpu else 768
    # Numbers that differ: a GPU that multiplies equal ones draws less power, and is faster than it will be in training.
    a = torch.linspace(-1, 1, size * size, device=device, dtype=dtype).view(size, size)
    best, end = float("inf"), time.monotonic() + seconds
    while best == float("inf") or time.monotonic() < end:
        began = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


@dataclass(frozen=True)
class Utilisation:
    """The share of the machines that a step used. peak: FLOP/s that all workers together reach on plain matmuls."""

    account: Account
    peak: float

    def of(self, starts: Iterable[np.ndarray], seconds: float) -> dict[str, float]:
        """`model_flops` a second and, as a share of the peak, `mfu`, of a batch that took `seconds`.

        starts: bool [L] of each packed sequence, True where a piece of a document begins.
        """
        rate = self.account.flops(length for s in starts for length in pieces(s)).model / seconds
        return {"model_flops": rate, "mfu": rate / self.peak}


def pieces(starts: np.ndarray) -> list[int]:
    """The lengths of a packed sequence's pieces of documents."""
    ends = [*starts.nonzero()[0].tolist(), len(starts)]
    return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
