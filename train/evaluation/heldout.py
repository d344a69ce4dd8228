"""The held-out loss and accuracy: over the targets of the held-out documents, run by the same executor as training."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from data.roles import roles_of
from parallel.schedule.plan import Plan
from train.execute import Executor
from train.hooks import Hook, Record
from train.metrics.timing import PhaseTimes, pieces
from train.optim.average import Average
from train.state import TrainProgress


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
        """The scores as metrics.jsonl has them."""
        record: dict[str, Any] = {"heldout_loss": self.overall.loss, "heldout_accuracy": self.overall.accuracy}
        by_source = {name: means._asdict() for name, means in self.sources.items()}
        return record | ({"heldout": by_source} if by_source else {})


def heldout(executor: Executor, batches: Any, plan: Callable[[list[int]], Plan]) -> Heldout:
    """Over the held-out windows' targets that are text: the end of a document is not one. Collective."""
    sums: dict[str, tuple[float, float, int]] = {}
    for name, windows in batches.heldout_by_source().items():
        sums[name] = _sums(executor, batches, windows, plan)
    nats, right, targets = zip(*sums.values(), strict=True)
    sources = {name: Means.of(*sums_of_source) for name, sums_of_source in sums.items() if name}
    return Heldout(Means.of(sum(nats), sum(right), sum(targets)), sources)


def _sums(
    executor: Executor, batches: Any, windows: list[Any], plan: Callable[[list[int]], Plan]
) -> tuple[float, float, int]:
    """Sums over some windows: nats, targets that are the likeliest token, and targets."""
    marks, nats, right, targets = [*roles_of(batches.tokenizer).marks], 0.0, 0.0, 0
    scored = [replace(s, targets=np.where(np.isin(s.targets, marks), -100, s.targets)) for s in windows]
    for begin in range(0, len(scored), batches.windows_per_batch):
        batch = scored[begin : begin + batches.windows_per_batch]
        tally = executor.evaluate(plan([len(s.tokens) for s in batch]), batch)
        parts = torch.stack([tally.cross_entropy.double(), tally.correct.double()])
        more, hits = executor.groups.stages_comm.all_reduce(parts, purpose="evaluation").tolist()
        nats, right = nats + more, right + hits
        targets += sum(int(np.count_nonzero(s.targets != -100)) for s in batch)
    return nats, right, targets


def drift(before: dict[str, float], scores: Heldout, sides: dict[str, bool]) -> dict[str, dict[str, float]]:
    """Returns what has been lost and learnt since the run began, in nats per target of held-out text.

    before: the loss on each source then. sides: of each source whether it is old. forgetting: by how much the loss on
    each old source has risen; adaptation: by how much that on each new one has fallen.
    """
    now = {name: means.loss for name, means in scores.sources.items()}
    return {
        "forgetting": {name: now[name] - before[name] for name, old in sides.items() if old},
        "adaptation": {name: before[name] - now[name] for name, old in sides.items() if not old},
    }


@dataclass(kw_only=True)
class Evaluation(Hook):
    """Adds the held-out loss to the record of a step at which it is due, and what has been forgotten and learnt since.

    plan: of windows of these lengths. seed: of the order of batches. average: averaged weights to evaluate too.
    bytes_per_target: of held-out text, on rank 0, which alone records bits per byte. replays: the run starts from
    weights that may forget an old source, so that these are evaluated first; `log` takes that record, of step 0.
    """

    key: ClassVar[str] = "before"

    executor: Executor
    batches: Any
    plan: Callable[[list[int]], Plan]
    progress: TrainProgress
    phases: PhaseTimes
    seed: int
    log: Callable[[Record], None]
    average: Average | None = None
    bytes_per_target: float | None = None
    replays: bool = False
    before: dict[str, float] | None = None  # the loss on each source before the first step of a run that replays

    def state(self) -> dict[str, Any] | None:
        return self.before

    def load(self, state: dict[str, Any]) -> None:
        if state:
            self.before = state

    def before_run(self) -> None:
        """Evaluates the weights before they are trained on, where an old source may be forgotten."""
        if not self.replays or self.before is not None:
            return
        with self.phases("evaluate"):
            scores = heldout(self.executor, self.batches, self.plan)
        self.before = {name: means.loss for name, means in scores.sources.items()}
        state = self.progress.state
        at = {"step": state.step, "tokens": state.tokens, "time": time.time(), "attempt": state.attempt}
        self.log(at | self._told(scores))

    def after_step(self, record: Record) -> None:
        """Evaluates where that is due, and at the end; not for a stop, which should not take long."""
        progress = self.progress
        at_the_end = progress.complete and not progress.stopping
        if not at_the_end and not progress.due(progress.settings.evaluate_every):
            return
        with self.phases("evaluate"):
            record |= self._told(heldout(self.executor, self.batches, self.plan))
            record |= self.averaged()
            batch = self.batches.batch(self.seed, progress.state.step - 1, progress.state.skips)
            record["documents"] = document_lengths([s.starts[s.counted] for s in batch])

    def averaged(self) -> Record:
        """Returns held-out loss and accuracy of the averaged weights, {} where there are none. Collective."""
        if self.average is None:
            return {}
        with self.average.swapped():
            loss, accuracy = heldout(self.executor, self.batches, self.plan).overall
        return {"heldout_loss_average": loss, "heldout_accuracy_average": accuracy}

    def _told(self, scores: Heldout) -> Record:
        record = scores.record()
        if self.before is not None:
            record |= drift(self.before, scores, self.batches.sides)
        if self.bytes_per_target:
            record["heldout_bits_per_byte"] = scores.overall.loss / math.log(2) / self.bytes_per_target
        return record


def document_lengths(starts: Sequence[np.ndarray]) -> list[list[int]]:
    """Returns how many pieces of documents have at most so many tokens: [limit, count], limits the powers of two in
    use.

    starts: bool [L] of each packed sequence, True where a piece begins. A limit counts what is above the one before.
    """
    lengths = [length for s in starts for length in pieces(s)]
    counts = Counter((length - 1).bit_length() for length in lengths)
    return [[1 << power, counts[power]] for power in range(min(counts), max(counts) + 1)]
