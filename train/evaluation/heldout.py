"""The held-out loss and accuracy: over the targets of the held-out documents, run by the same executor as training."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from data.roles import roles_of
from parallel.schedule.plan import Plan
from train.execute import Executor


class Means(NamedTuple):
    """loss: mean, in nats per target. accuracy: the share of the targets that are the likeliest token."""

    loss: float
    accuracy: float

    @classmethod
    def of(cls, nats: float, right: float, targets: int) -> "Means":
        return cls(nats / max(targets, 1), right / max(targets, 1))


class Heldout(NamedTuple):
    """over all: of all held-out targets. sources: by the names of the corpora of a mixture; {} of one corpus."""

    overall: Means
    sources: dict[str, Means]

    def record(self) -> dict[str, Any]:
        """As metrics.jsonl has it."""
        found: dict[str, Any] = {"heldout_loss": self.overall.loss, "heldout_accuracy": self.overall.accuracy}
        by_source = {name: means._asdict() for name, means in self.sources.items()}
        return found | ({"heldout": by_source} if by_source else {})


def heldout(executor: Executor, batches: Any, plan: Callable[[list[int]], Plan]) -> Heldout:
    """Over the held-out windows' targets that are text: the end of a document is not one. Collective."""
    sums: dict[str, tuple[float, float, int]] = {}
    for name, windows in batches.heldout_by_source().items():
        sums[name] = _sums(executor, batches, windows, plan)
    nats, right, targets = zip(*sums.values(), strict=True)
    sources = {name: Means.of(*found) for name, found in sums.items() if name}
    return Heldout(Means.of(sum(nats), sum(right), sum(targets)), sources)


def _sums(
    executor: Executor, batches: Any, windows: list[Any], plan: Callable[[list[int]], Plan]
) -> tuple[float, float, int]:
    """Of some windows: nats, targets that are the likeliest token, and targets."""
    marks, nats, right, targets = [*roles_of(batches.tokenizer).marks], 0.0, 0.0, 0
    scored = [replace(s, targets=np.where(np.isin(s.targets, marks), -100, s.targets)) for s in windows]
    for begin in range(0, len(scored), batches.windows_per_batch):
        batch = scored[begin : begin + batches.windows_per_batch]
        tally = executor.evaluate(plan([len(s.tokens) for s in batch]), batch)
        parts = torch.stack([tally.cross_entropy.double(), tally.correct.double()])
        more, hits = executor.groups.world_comm.all_reduce(parts, purpose="evaluation").tolist()
        nats, right = nats + more, right + hits
        targets += sum(int(np.count_nonzero(s.targets != -100)) for s in batch)
    return nats, right, targets


def drift(before: dict[str, float], scores: Heldout, sides: dict[str, bool]) -> dict[str, dict[str, float]]:
    """What has been lost and learnt since the run began, in nats per target of held-out text.

    before: the loss on each source then. sides: of each source whether it is old. forgetting: by how much the loss on
    each old source has risen; adaptation: by how much that on each new one has fallen.
    """
    now = {name: means.loss for name, means in scores.sources.items()}
    return {
        "forgetting": {name: now[name] - before[name] for name, old in sides.items() if old},
        "adaptation": {name: before[name] - now[name] for name, old in sides.items() if not old},
    }
