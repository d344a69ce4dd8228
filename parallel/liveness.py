"""Marks of this process: the collective that it waits in, and the layer. A watchdog that finds it silent reports them.

Every wait for other ranks is entered here, by whichever thread waits, and each entry and exit is a sign of life. A
watch (`launch.world.watchdog`) reads it from a thread of its own; nothing here communicates.
"""

import contextlib
import itertools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

TIMEOUT = timedelta(hours=24)  # of process groups: above any patience, for it could name neither rank nor layer

PULSE_S = 120.0  # until steps tell more: an import, or the sorting of a large table, may keep a process from running


class Wait(NamedTuple):
    """A wait for other ranks. layer: the slot that it is for, "" outside of layers. ranks: of the world, None: all."""

    layer: str
    purpose: str
    kind: str  # all-gather, receive, …
    ranks: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.layer, f"{self.purpose} ({self.kind})")))


class Liveness:
    """patience: seconds without a sign of life that are no fault; None while nobody should ask. pulse: the same of a
    process that does not run at all, whatever it was about; the shorter of the two counts.

    doing: what is done where no collective is entered by name, "" in a step.
    """

    def __init__(self) -> None:
        self.patience: float | None = None
        self.pulse = PULSE_S
        self.doing = ""
        self.signs = 0  # of life
        self._open: dict[int, Wait] = {}
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def waiting(self, wait: Wait) -> Iterator[None]:
        """While this thread is blocked on other ranks."""
        number = next(self._numbers)
        self._open[number] = wait
        self.signs += 1
        try:
            yield
        finally:
            del self._open[number]
            self.signs += 1

    def marked(self, work: Any, wait: Wait) -> "Marked":
        """`work` of torch.distributed, whose `wait()` is entered here."""
        return Marked(self, work, wait)

    @property
    def wait(self) -> Wait | None:
        """The oldest wait that has not ended; None where every thread computes."""
        waits = list(self._open.values())
        return waits[0] if waits else None


class Marked:
    """A `dist.Work` as far as it is used here."""

    __slots__ = ("_here", "_wait", "_work")

    def __init__(self, here: Liveness, work: Any, wait: Wait):
        self._here, self._work, self._wait = here, work, wait

    def wait(self) -> Any:
        with self._here.waiting(self._wait):
            return self._work.wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


HERE = Liveness()  # of this process
