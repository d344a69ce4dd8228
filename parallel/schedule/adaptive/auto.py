"""`scheduler=auto`: adaptive groups where the cost model says that they pay, one size of group a step elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.packing import Packing
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.adaptive.rivals import LongestFirst
from parallel.schedule.adaptive.search import TooLongError
from parallel.schedule.adaptive.simulate import seconds


class Auto:
    """margin: of a static step's seconds that adaptive groups must save. Below it the simpler plan is taken: constants
    are known to a few per cent, and groups that do not change need no new process groups."""

    def __init__(self, costs: Costs, margin: float = 0.01, quantum: int = 128):
        self.costs, self.margin = costs, margin
        self._adaptive, self._static = Planner(costs, quantum=quantum), LongestFirst(costs)

    def choose(self, lengths: Sequence[int]) -> tuple[str, Packing]:
        """`static` or `adaptive`, and its packing. Raises TooLongError."""
        adaptive = self._adaptive.plan(lengths).packing
        try:
            static = self._static.pack(lengths)
        except TooLongError:  # a sequence fits only where it is computed again
            return "adaptive", adaptive
        pays = seconds(self.costs, adaptive, lengths) < (1 - self.margin) * seconds(self.costs, static, lengths)
        return ("adaptive", adaptive) if pays else ("static", static)

    def pack(self, lengths: Sequence[int]) -> Packing:
        return self.choose(lengths)[1]
