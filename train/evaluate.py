"""The held-out loss, in nats per byte: over the held-out documents' bytes, run by the same executor as training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.schedule.plan import Plan
from train.execute import Executor


@dataclass(frozen=True)
class _Scored:
    """A packed sequence whose targets are only those that are scored."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray


def heldout_loss(executor: Executor, batches: Any, plan: Callable[[list[int]], Plan]) -> float:
    """Mean loss over the held-out windows' targets that are text: the end of a document is not one. Collective."""
    special = batches.tokenizer.DOCUMENT
    windows = [
        _Scored(s.tokens, np.where(s.targets == special, -100, s.targets), s.positions) for s in batches.heldout()
    ]
    total, count = 0.0, 0
    for begin in range(0, len(windows), batches.windows_per_batch):
        batch = windows[begin : begin + batches.windows_per_batch]
        tally = executor.evaluate(plan([len(s.tokens) for s in batch]), batch)
        total += executor.groups.world_comm.all_reduce(tally.cross_entropy.double()).item()
        count += sum(int(np.count_nonzero(s.targets != -100)) for s in batch)
    return total / max(count, 1)
