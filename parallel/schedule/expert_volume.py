"""The traffic of rows that travel to experts on other ranks: bytes and calls that a rank receives, by purpose.

With P ranks of an expert group, L experts on each, rows of D numbers, a layer receives, forward and backward each:

    counted   a row for each choice of another rank's token that is of an expert here, and one for each choice of an own
              token whose expert is elsewhere; forward, (P-1)·L counts of 8 bytes before them
    padded    (P-1)·L·C rows twice, C the most choices of one expert on any rank that its capacity allows

How many rows travel is known where they are padded; else it follows from the routers' choices, which nobody knows
beforehand: `evenly` says how many if every expert were chosen as often.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parallel.schedule.comm_volume import GRADIENT, Both, Traffic
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Plan
from parallel.schedule.time_spans import Shape, shapes

COUNTS, ROWS, OUTPUTS = "expert counts", "expert rows", "expert outputs"
COUNT_BYTES = 8


@dataclass(frozen=True)
class ExpertCall:
    """A layer's experts: choices a token makes among `experts`, rows of `width` numbers. capacity: the factor of the
    fair share that an expert takes of a span, None for any."""

    choices: int
    experts: int
    width: int
    itemsize: int
    capacity: float | None = None

    def room(self, spans: Iterable[Shape]) -> int:
        """The most choices of one expert on a rank, of those that have spans of these shapes."""
        assert self.capacity is not None
        fair = self.capacity * self.choices / self.experts
        return max(count * math.ceil(fair * tokens - 1e-9) for count, tokens in spans)

    def padded(self, ranks: int, spans: Iterable[Shape]) -> Both:
        """Traffic of a rank of `ranks`, all of whose spans have these shapes."""
        rows = (ranks - 1) * (self.experts // ranks) * self.room(spans)
        return self._both(rows, rows)

    def counted(self, ranks: int, received: int, given: int) -> Both:
        """Traffic of a rank that takes so many rows from others, and gives so many to them."""
        both = self._both(received, given)
        both.forward.add(COUNTS, (ranks - 1) * (self.experts // ranks) * COUNT_BYTES)
        return both

    def _both(self, received: int, given: int) -> Both:
        row, both = self.width * self.itemsize, Both(Traffic(), Traffic())
        both.forward.add(ROWS, received * row)
        both.forward.add(OUTPUTS, given * row)
        both.backward.add(OUTPUTS + GRADIENT, received * row)
        both.backward.add(ROWS + GRADIENT, given * row)
        return both


def of_experts(
    plan: Plan, mesh: Mesh, calls: Sequence[ExpertCall], *, padded: bool, recompute: str = "none"
) -> dict[int, Traffic]:
    """Traffic that each of the plan's ranks receives on the expert axis in a step of training: exact where rows are
    padded, else as if every expert were chosen as often. recompute: `engine.recompute`."""
    planned = Mesh(replicate=mesh.replicate, data=mesh.data, expert=mesh.expert, sequence=mesh.sequence)
    traffic = {rank: Traffic() for rank in range(planned.world)}
    if mesh.expert == 1:
        return traffic
    again = 2 if recompute == "full" else 1
    for micro in plan.micro_steps:
        together = shapes(micro.groups)
        held = {
            r: sum(e - b for b, e in spans) or 1
            for g in micro.groups
            for r, spans in zip(g.ranks, g.spans, strict=True)
        }
        for group in planned.groups("expert"):
            for rank in group:
                for call in calls:
                    others = sum(held[other] for other in group if other != rank)
                    received, given = evenly(call, mesh.expert, held[rank], others)
                    both = call.padded(mesh.expert, together) if padded else call.counted(mesh.expert, received, given)
                    traffic[rank].include(both.forward, again)
                    traffic[rank].include(both.backward)
    return traffic


def evenly(call: ExpertCall, ranks: int, own: int, others: int) -> tuple[int, int]:
    """The rows that a rank takes and gives if every expert were chosen as often. own, others: tokens of this rank, and
    of all others of its group."""
    return round(others * call.choices / ranks), round(own * call.choices * (ranks - 1) / ranks)
