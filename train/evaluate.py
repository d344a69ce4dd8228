"""The held-out loss and accuracy: over the targets of the held-out documents, run by the same executor as training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from parallel.schedule.plan import Plan
from train.execute import Executor


class Heldout(NamedTuple):
    """loss: mean, in nats per target. accuracy: the share of the targets that are the likeliest token."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class _Scored:
    """A packed sequence whose targets are only those that are scored."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray


def heldout(executor: Executor, batches: Any, plan: Callable[[list[int]], Plan]) -> Heldout:
    """Over the held-out windows' targets that are text: the end of a document is not one. Collective."""
    special = batches.tokenizer.DOCUMENT
    windows = [
        _Scored(s.tokens, np.where(s.targets == special, -100, s.targets), s.positions) for s in batches.heldout()
    ]
    total, correct, count = 0.0, 0.0, 0
    for begin in range(0, len(windows), batches.windows_per_batch):
        batch = windows[begin : begin + batches.windows_per_batch]
        tally = executor.evaluate(plan([len(s.tokens) for s in batch]), batch)
        parts = torch.stack([tally.cross_entropy.double(), tally.correct.double()])
        nats, right = executor.groups.world_comm.all_reduce(parts, purpose="evaluation").tolist()
        total, correct = total + nats, correct + right
        count += sum(int(np.count_nonzero(s.targets != -100)) for s in batch)
    return Heldout(total / max(count, 1), correct / max(count, 1))
