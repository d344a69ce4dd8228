"""All schedulers side by side on one cluster, model and set of batches, as a table. This is how a cluster is sized."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from parallel.schedule.adaptive.auto import Auto
from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.packing import Packing
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.adaptive.rivals import Balanced, BestFit, LongestFirst, OneSize, Scheduler, WorkByPairs
from parallel.schedule.adaptive.simulate import timing


class _Adaptive:
    """The fast planner behind the schedulers' interface. `bounds`: of what it has planned, in order."""

    def __init__(self, costs: Costs, quantum: int = 128):
        self._planner, self.bounds = Planner(costs, quantum=quantum), list[float]()

    def pack(self, lengths: Sequence[int]) -> Packing:
        planned = self._planner.plan(lengths)
        self.bounds.append(planned.bound)
        return planned.packing


_OPTIONAL = {"megatron_balanced": "megatron-core"}

SCHEDULERS: dict[str, Callable[[Costs], Scheduler]] = {
    "adaptive": _Adaptive,
    "auto": Auto,
    "one_size": OneSize,
    "longest_first": LongestFirst,
    "best_fit": BestFit,
    "all_ranks": lambda costs: BestFit(costs, max(costs.sizes)),
    "megatron": WorkByPairs,
    "megatron_balanced": Balanced,
}
"""By the name that a table shows: groups of one size a step, packed by our planner, the longest first, or by best fit;
all ranks for every sequence; Megatron's packing-aware rule, and its older scheduler, which needs megatron-core."""


@dataclass(frozen=True)
class Row:
    """Means over batches; peak, planning and imbalance are the largest. seconds: [batches]. why: of no row at all."""

    name: str
    seconds: np.ndarray
    micro_steps: float
    utilisation: float
    imbalance: float
    peak: float
    planning: float
    why: str = ""


def compare(
    costs: Costs, batches: Sequence[Sequence[int]], names: Iterable[str] | None = None, *, quantum: int = 128
) -> list[Row]:
    """A row a scheduler; lengths are judged as multiples of `quantum`. Without names, schedulers that are not installed
    have none.

    Raises TooLongError where a sequence fits not even a group of all ranks, ValueError for a name that is not
    installed. A scheduler whose own limits a sequence breaks has a row that says so.
    """
    padded = [(-(-np.asarray(lengths, dtype=np.int64) // quantum) * quantum).tolist() for lengths in batches]
    rows = []
    for name in names or SCHEDULERS:
        try:
            scheduler = SCHEDULERS[name](costs)
        except ImportError:
            if names is not None:
                raise ValueError(f"{name} needs {_OPTIONAL[name]}, which is not installed") from None
            continue
        timings, planning = [], []
        try:
            for lengths in padded:
                began = time.perf_counter()
                packing = scheduler.pack(lengths)
                planning.append(time.perf_counter() - began)
                timings.append(timing(costs, packing, lengths))
        except ValueError as error:
            if name == "adaptive":
                raise
            rows.append(Row(name, np.zeros(0), 0, 0, 0, 0, 0, str(error)))
            continue
        rows.append(
            Row(
                name,
                np.array([t.seconds for t in timings]),
                float(np.mean([len(t.micro_steps) for t in timings])),
                float(np.mean([t.utilisation for t in timings])),
                max(t.imbalance for t in timings),
                max(float(t.peak.max()) for t in timings),
                max(planning),
            )
        )
    return rows


def text(rows: Sequence[Row], costs: Costs) -> list[str]:
    """The table for people, a line a scheduler."""
    base = next((row for row in rows if not row.why), None)
    lines = [
        f"{'scheduler':<18} {'s/step':>9} {'over ' + base.name if base else '':>18} {'micro-steps':>11} {'busy':>6} "
        f"{'max/mean':>8} {'peak GiB':>8} {'plan ms':>8}"
    ]
    for row in rows:
        if row.why:
            lines.append(f"{row.name:<18} {row.why}")
            continue
        over = row.seconds.mean() / base.seconds.mean() if base else 1.0
        lines.append(
            f"{row.name:<18} {row.seconds.mean():>9.4g} {over:>18.3f} {row.micro_steps:>11.1f} "
            f"{row.utilisation:>6.1%} {row.imbalance:>8.2f} {row.peak / 2**30:>8.1f} {1e3 * row.planning:>8.1f}"
        )
    room = min(costs.rank_tokens.max(axis=0))
    lines.append(
        f"{costs.cluster.name}: {costs.states / 2**30:.1f} GiB of states a rank, room for {int(room):,} tokens of "
        f"activations; the longest sequence that fits has {int(room) * max(costs.sizes):,}"
    )
    return lines
