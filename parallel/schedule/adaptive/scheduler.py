"""The adaptive scheduler as a run chooses it: its keys, and the groups that it makes of a step's lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from parallel.schedule.adaptive.auto import Auto
from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.packing import Packing
from parallel.schedule.adaptive.planner import Planner, rounded
from parallel.schedule.plan import Plan
from parallel.schedule.static import Static, checked_simulate

AdaptiveLayout = Literal["auto", "contiguous"]
ADAPTIVE_LAYOUTS = get_args(AdaptiveLayout)


class Adaptive:
    """Groups that suit the lengths of each step: a long document runs on many ranks while short ones run on one each.

    Plans by the costs of the run's own model, measured (`farspan plan cost.profile=true`) or from its shapes; rank 0
    plans ahead, beside the step that runs. The loss is that of any other scheduler. Evaluations run in groups of
    parallel.data and parallel.sequence, as with the static scheduler.

    tokens_per_rank: the most tokens a rank may hold in one micro-step; null for no limit but `memory`. memory: GiB of a
    rank, which limits states and activations by the shapes of the model; null for no such limit. margin: the share of a
    step's seconds that adaptive groups must save over groups of one size, or those are taken; null for adaptive groups
    in every step. documents: true plans every document of a batch as a sequence of its own and leaves padding out;
    false plans packed sequences of data.max_length. quantum: lengths are planned as multiples of so many tokens.
    stragglers: true gives a rank work by its speed, as its last steps show it. layout: auto gives a rank of a group two
    spans, which balances causal attention (zigzag); contiguous gives it one. simulate: steps over which `farspan plan`
    compares all schedulers on the cluster of `simulation`; null for the run's plan; no run reads it.
    """

    def __init__(
        self,
        *,
        tokens_per_rank: int | None = None,
        memory: float | None = None,
        margin: float | None = None,
        documents: bool = True,
        quantum: int = 128,
        stragglers: bool = True,
        layout: AdaptiveLayout = "auto",
        simulate: int | None = None,
    ):
        self.simulate = checked_simulate(simulate)
        if tokens_per_rank is not None and tokens_per_rank < 1:
            raise ValueError(f"scheduler.tokens_per_rank={tokens_per_rank}: must be at least 1, or null for no limit")
        if memory is not None and not 0 < memory < math.inf:
            raise ValueError(f"scheduler.memory={memory}: must be positive and finite, or null for no limit")
        if margin is not None and not 0 <= margin < 1:
            raise ValueError(f"scheduler.margin={margin}: must be at least 0 and below 1, or null")
        if not 1 <= quantum <= 2**20:
            raise ValueError(f"scheduler.quantum={quantum}: must be at least 1, and at most {2**20:,}")
        if tokens_per_rank is not None and tokens_per_rank < quantum:
            raise ValueError(
                f"scheduler.quantum={quantum}: must be at most scheduler.tokens_per_rank={tokens_per_rank}, which is "
                "all that a rank may hold"
            )
        if layout not in ADAPTIVE_LAYOUTS:
            raise ValueError(f"scheduler.layout={layout}: must be one of {', '.join(ADAPTIVE_LAYOUTS)}")
        self.tokens_per_rank, self.memory, self.margin = tokens_per_rank, memory, margin
        self.documents, self.quantum, self.stragglers, self.layout = documents, quantum, stragglers, layout

    def plan(self, step: int, lengths: list[int], *, data: int, sequence: int) -> Plan:
        """A plan of groups of one size, of sequences that are to be evaluated: no costs are needed for it."""
        split = Static(layout="auto" if self.layout == "auto" else "contiguous")
        return split.plan(step, lengths, data=data, sequence=sequence)

    def pack(self, costs: Costs, lengths: Sequence[int]) -> tuple[str, Packing]:
        """`adaptive` or `static`, and the groups of a step of training. Raises TooLongError."""
        if self.margin is None:
            return "adaptive", Planner(costs, quantum=self.quantum).plan(lengths).packing
        padded: list[int] = rounded(costs, lengths, self.quantum).tolist()
        return Auto(costs, margin=self.margin, quantum=1).choose(padded)
