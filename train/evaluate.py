"""The held-out loss, in nats per byte: over the held-out documents' bytes, run by the same executor as training."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class _Scored:
    """A packed sequence whose targets are only those that are scored."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray


def heldout_loss(trainer: Any) -> float:
    """Mean loss over the held-out windows' targets that are text: the end of a document is not one. Collective."""
    special = trainer.batches.tokenizer.DOCUMENT
    windows = [
        _Scored(s.tokens, np.where(s.targets == special, -100, s.targets), s.positions)
        for s in trainer.batches.heldout()
    ]
    size = trainer.batches.windows_per_batch
    total, count = 0.0, 0
    trainer.model.eval()
    for begin in range(0, len(windows), size):
        batch = windows[begin : begin + size]
        lengths = [len(s.tokens) for s in batch]
        plan = trainer.scheduler.plan(trainer.state.step, lengths, data=trainer.data, sequence=trainer.sequence)
        tally = trainer.executor.evaluate(plan, batch)
        total += trainer.groups.world_comm.all_reduce(tally.cross_entropy.double()).item()
        count += sum(int(np.count_nonzero(s.targets != -100)) for s in batch)
    trainer.model.train()
    return total / max(count, 1)
