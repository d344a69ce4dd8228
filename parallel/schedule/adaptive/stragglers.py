"""Speeds of ranks, from the times of their micro-steps, with hysteresis: noise changes nothing, a slow rank does.

A rank's speed is what its computing should have taken over what it took, relative to the median rank, averaged over
steps with a half-life. The cost model is changed only when a rank has been `change` away from what the model believes
for `patience` steps in a row; then all ranks' speeds are set at once, to the average, and counting starts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from parallel.schedule.adaptive.cost import Floats


class Speeds:
    """half_life: of the average, in steps. change: relative. patience: steps. floor: the slowest speed believed."""

    def __init__(
        self, ranks: int, *, half_life: float = 2.0, change: float = 0.15, patience: int = 4, floor: float = 0.05
    ):
        if not (half_life > 0 and 0 < change < 1 and patience >= 1 and 0 < floor < 1):
            raise ValueError(
                f"half_life={half_life}, change={change}, patience={patience}, floor={floor}: out of range"
            )
        self.believed: Floats = np.ones(ranks)
        self._average: Floats = np.ones(ranks)
        self._away = np.zeros(ranks, dtype=np.int64)
        self._weight, self._change, self._patience, self._floor = 0.5 ** (1 / half_life), change, patience, floor

    def state(self) -> dict[str, Any]:
        """All that a later `observe` depends on, in JSON's types."""
        return {"believed": self.believed.tolist(), "average": self._average.tolist(), "away": self._away.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave of as many ranks. Raises KeyError or ValueError for something else."""
        believed, average = (np.array(state[name], dtype=np.float64) for name in ("believed", "average"))
        away = np.array(state["away"], dtype=np.int64)
        if not believed.shape == average.shape == away.shape == self._away.shape or min(*believed, *average) <= 0:
            raise ValueError(f"speeds of {len(believed)} ranks, there are {len(self._away)}")
        self.believed, self._average, self._away = believed, average, away

    def observe(self, expected: Sequence[float] | Floats, measured: Sequence[float] | Floats) -> str | None:
        """After a step: seconds of computing that a rank of speed 1 needs for each rank's share, and what it took.

        A rank that computed nothing (0 expected) keeps its average. Returns a line for the log where the cost model is
        to be changed to `believed` from the next step on; None elsewhere. Raises ValueError for a time that is none.
        """
        want, took = np.asarray(expected, dtype=np.float64), np.asarray(measured, dtype=np.float64)
        worked = want > 0
        if want.shape != self._average.shape or took.shape != want.shape or not (took[worked] > 0).all():
            raise ValueError(f"{len(want)} expected and {len(took)} measured times for {len(self._average)} ranks")
        if not worked.any():
            return None
        speed = want[worked] / took[worked]
        speed = np.clip(speed / np.median(speed), self._floor, 1 / self._floor)
        self._average[worked] = self._weight * self._average[worked] + (1 - self._weight) * speed
        away = np.abs(self._average / self.believed - 1) > self._change
        self._away = np.where(away, self._away + 1, 0)
        if (self._away < self._patience).all():
            return None
        before, self.believed = self.believed, self._average.copy()
        self._away[:] = 0
        far = np.flatnonzero(np.abs(self.believed / before - 1) > self._change)
        changes = ", ".join(f"rank {r} at {self.believed[r]:.2f} (was {before[r]:.2f})" for r in far)
        return f"speeds of ranks changed: {changes}; the next plan gives them work accordingly"
