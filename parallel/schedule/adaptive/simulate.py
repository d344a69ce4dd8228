"""A simulation of a packing on its cluster: seconds, and how busy and how full ranks are. No GPU, no process group.

`Timing` reads the costs of `cost.py` and nothing of any planner, so that all schedulers are compared alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel.schedule.adaptive.cost import Costs, Floats
from parallel.schedule.adaptive.packing import Packing, Share


@dataclass(frozen=True)
class Timing:
    """Times of one step. micro_steps: seconds of each. busy: [ranks], seconds in which a rank computes or sends,
    launches included. loads: [ranks], the same without launches. peak: [ranks], bytes. once: seconds beside those of
    micro-steps, in which all ranks send."""

    micro_steps: tuple[float, ...]
    busy: Floats
    loads: Floats
    peak: Floats
    once: float = 0.0

    @property
    def seconds(self) -> float:
        return self.once + sum(self.micro_steps)

    @property
    def utilisation(self) -> float:
        """The mean rank's busy share of the step."""
        return float(self.busy.mean()) / self.seconds

    @property
    def imbalance(self) -> float:
        """The largest over the mean load of ranks."""
        return float(self.loads.max() / self.loads.mean())


def timing(costs: Costs, packing: Packing, lengths: Sequence[int]) -> Timing:
    """lengths: of the sequences, in tokens."""
    ranks, launch = costs.cluster.ranks, costs.model.launch
    loads, peak = np.zeros(ranks), np.full(ranks, costs.states)
    micro_steps = []
    for shares in packing.micro_steps:
        groups = []
        for share in shares:
            held = [lengths[s] for s in share.sequences]
            choice = costs.names.index(share.recompute)
            own = slice(share.first, share.first + share.size)
            groups.append(costs.group(held, share.first, share.size, choice))
            loads[own] += groups[-1].sum()
            memory = costs.states + costs.token_bytes[choice] * sum(held) / share.size
            peak[own] = np.maximum(peak[own], memory)
        micro_steps.append(costs.micro_step(groups))
    once = costs.model.once
    return Timing(tuple(micro_steps), loads + launch * len(micro_steps) + once, loads, peak, once)


def seconds(costs: Costs, packing: Packing, lengths: Sequence[int]) -> float:
    """Seconds of the whole step."""
    return timing(costs, packing, lengths).seconds


def rows(shares: tuple[Share, ...]) -> list[Share]:
    """The groups of a micro-step in the order of their ranks."""
    return sorted(shares, key=lambda share: share.first)
