"""The silence of a rank after which a run counts as stuck: as long as its own steps make likely."""

import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from parallel.liveness import HERE, PULSE_S, Liveness

FIRST_S = 600.0  # of a step before any is known: compilation, a cold file system; and of what is not a step
LEAST_S = 60.0
STEPS = 20  # the patience in median steps, and of how many of the last ones


class Patience:
    """Sets `parallel.liveness`' patience and pulse. timeout: `cluster.timeout`, seconds; None: follows the steps."""

    def __init__(self, timeout: float | None, here: Liveness = HERE):
        self._timeout, self._here = timeout, here
        self._seconds: deque[float] = deque(maxlen=STEPS)
        self._set()

    def stepped(self, seconds: float) -> None:
        """A step has ended, which took so long."""
        self._seconds.append(seconds)
        self._here.signs += 1
        self._set()

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Returns what is not a step and enters no collective by name: a checkpoint, say."""
        self._here.doing, self._here.patience = doing, max(FIRST_S, self.seconds)
        self._here.signs += 1
        try:
            yield
        finally:
            self._here.doing = ""
            self._here.signs += 1
            self._set()

    def end(self) -> None:
        """Nobody waits for anybody any more."""
        self._here.patience = None

    @property
    def seconds(self) -> float:
        """The first two steps are not typical of the others: a run goes from one to the next in memory that grows."""
        if len(self._seconds) < 2:
            return max(FIRST_S, self._timeout or 0.0)
        return self._timeout or max(LEAST_S, STEPS * statistics.median(self._seconds))

    def _set(self) -> None:
        self._here.patience = self.seconds
        least = self._timeout or PULSE_S
        self._here.pulse = self.seconds if len(self._seconds) >= 2 else max(LEAST_S, least)
