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
from parallel.schedule.static import Static
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
    """overall: of all held-out targets. sources: by the names of the corpora of a mixture; {} of one corpus. tokens: of
    the windows that were read, padding left out. whole: these are all. part: the scores of the windows that evaluations
    before the end read, where these are some of those read here."""

    overall: Means
    sources: dict[str, Means]
    tokens: int = 0
    whole: bool = True
    part: "Heldout | None" = None

    @property
    def losses(self) -> dict[str, float]:
        """The loss on each source of a mixture."""
        return {name: means.loss for name, means in self.sources.items()}

    def record(self) -> dict[str, Any]:
        """The scores as metrics.jsonl has them."""
        record: dict[str, Any] = {"heldout_loss": self.overall.loss, "heldout_accuracy": self.overall.accuracy}
        record["heldout_tokens"] = self.tokens
        record |= self._by_source()
        if (part := self.part) is not None:
            record["heldout_part"] = part.overall._asdict() | {"tokens": part.tokens} | part._by_source()
        return record

    def _by_source(self) -> dict[str, Any]:
        by_source = {name: means._asdict() for name, means in self.sources.items()}
        return {"heldout": by_source} if by_source else {}


class DividedWindows(NamedTuple):
    """The windows of a source that evaluations before the end read, and the rest."""

    read: list[Any]
    rest: list[Any]


def divided(by_source: dict[str, list[Any]], tokens: int | None) -> dict[str, DividedWindows]:
    """Takes about `tokens` of the held-out windows, the same number of each source and evenly spread over it, at least
    one; all of them for None. It looks at nothing but the windows: the part is the same at any time, on any ranks."""
    parts = {}
    for name, windows in by_source.items():
        wanted = len(windows) if tokens is None else max(tokens // len(by_source) // len(windows[0].tokens), 1)
        count = min(wanted, len(windows))
        chosen = {i * len(windows) // count for i in range(count)}
        parts[name] = DividedWindows(
            [window for i, window in enumerate(windows) if i in chosen],
            [window for i, window in enumerate(windows) if i not in chosen],
        )
    return parts


_Sums = tuple[float, float, int, int]


def heldout(
    executor: Executor,
    batches: Any,
    plan: Callable[[list[int]], Plan],
    *,
    tokens: int | None = None,
    whole: bool = True,
    at_once: int = 1,
) -> Heldout:
    """Scores the held-out windows' targets that are text: the end of a document is not one. Collective.

    tokens: those of a part of the windows, about, as `divided` takes it; None: all are one part. whole: read the rest
    as well, so that the scores are of all windows and `part` is of these. at_once: windows to plan together, at least.
    """
    parts = divided(batches.heldout_by_source(), tokens)
    size = max(batches.windows_per_batch, at_once)
    sums = {name: _sums(executor, batches, part.read, plan, size) for name, part in parts.items()}
    scores = _scores(sums)
    if not any(part.rest for part in parts.values()):
        return scores
    scores = scores._replace(whole=False)
    if not whole:
        return scores
    for name, part in parts.items():
        more = _sums(executor, batches, part.rest, plan, size)
        sums[name] = tuple(a + b for a, b in zip(sums[name], more, strict=True))  # type: ignore[assignment]
    return _scores(sums)._replace(part=scores)


def _scores(sums: dict[str, _Sums]) -> Heldout:
    nats, right, targets, tokens = zip(*sums.values(), strict=True)
    sources = {name: Means.of(*of_source[:3]) for name, of_source in sums.items() if name}
    return Heldout(Means.of(sum(nats), sum(right), sum(targets)), sources, sum(tokens))


def _sums(executor: Executor, batches: Any, windows: list[Any], plan: Callable[[list[int]], Plan], size: int) -> _Sums:
    """Sums over some windows: nats, targets that are the likeliest token, targets, and tokens."""
    marks, nats, right, targets = [*roles_of(batches.tokenizer).marks], 0.0, 0.0, 0
    scored = [replace(s, targets=np.where(np.isin(s.targets, marks), -100, s.targets)) for s in windows]
    for begin in range(0, len(scored), size):
        batch = scored[begin : begin + size]
        tally = executor.evaluate(plan([len(s.tokens) for s in batch]), batch)
        parts = torch.stack([tally.cross_entropy.double(), tally.correct.double()])
        more, hits = executor.groups.stages_comm.all_reduce(parts, purpose="evaluation").tolist()
        nats, right = nats + more, right + hits
        targets += sum(int(np.count_nonzero(s.targets != -100)) for s in batch)
    return nats, right, targets, sum(s.num_tokens for s in windows)


def apart(plan: Callable[[list[int]], Plan], *, data: int, sequence: int) -> tuple[Callable[[list[int]], Plan], int]:
    """Returns a plan for evaluation, and how many windows it wants at once.

    Forward alone keeps no activations, so that a rank can take twice as many tokens of a window as in training: groups
    of half the ranks have twice as many windows, and states and keys travel half as far, of two ranks not at all.
    plan: of training, for fewer windows, and where the ranks of a sequence cannot be halved.
    """
    if sequence % 2:
        return plan, 1
    halves = Static(layout="auto")

    def planned(lengths: list[int]) -> Plan:
        if len(lengths) < 2 * data:
            return plan(lengths)
        return halves.plan(0, lengths, data=2 * data, sequence=sequence // 2)

    return planned, 2 * data


def drift(before: dict[str, float], scores: Heldout, sides: dict[str, bool]) -> dict[str, dict[str, float]]:
    """Returns what has been lost and learnt since the run began, in nats per target of held-out text.

    before: the loss on each source then. sides: of each source whether it is old. forgetting: by how much the loss on
    each old source has risen; adaptation: by how much that on each new one has fallen.
    """
    now = scores.losses
    return {
        "forgetting": {name: now[name] - before[name] for name, old in sides.items() if old},
        "adaptation": {name: before[name] - now[name] for name, old in sides.items() if not old},
    }


@dataclass(kw_only=True)
class Evaluation(Hook):
    """Adds the held-out loss to the record of a step at which it is due, and what has been forgotten and learnt since.

    Evaluations before the end read the part of the held-out text that `train.evaluate_tokens` asks for; that at the end
    reads all of it, and has the part's scores beside. plan: of windows of these lengths, at least `at_once` of them
    where there are so many. seed: of the order of batches.
    average: averaged weights to evaluate too. bytes_per_target: of held-out text, of all of it and of the part, on rank
    0, which alone records bits per byte. replays: the run starts from weights that may forget an old source, so that
    these are evaluated first; `log` takes that record, of step 0.
    """

    key: ClassVar[str] = "before"

    executor: Executor
    batches: Any
    plan: Callable[[list[int]], Plan]
    at_once: int = 1
    progress: TrainProgress
    phases: PhaseTimes
    seed: int
    log: Callable[[Record], None]
    average: Average | None = None
    bytes_per_target: tuple[float | None, float | None] = (None, None)
    replays: bool = False
    before: dict[str, float] | None = None  # the loss on each source before the first step of a run that replays
    before_part: dict[str, float] | None = None  # and that on the part of so many tokens, where it is not all
    part_tokens: int = 0

    def state(self) -> dict[str, Any] | None:
        """Returns each source's loss before the first step, and that of the part beside, where this is not all."""
        if self.before is None or self.before_part is None:
            return self.before
        part, tokens = self.before_part, self.part_tokens
        return {name: {"whole": loss, "part": part[name], "tokens": tokens} for name, loss in self.before.items()}

    def load(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.before = {name: loss["whole"] if isinstance(loss, dict) else loss for name, loss in state.items()}
        of_part = {name: loss for name, loss in state.items() if isinstance(loss, dict)}
        if of_part.keys() == state.keys():
            self.before_part = {name: loss["part"] for name, loss in of_part.items()}
            self.part_tokens = next(iter(of_part.values()))["tokens"]

    def before_run(self) -> None:
        """Evaluates the weights before they are trained on, where an old source may be forgotten."""
        if not self.replays or self.before is not None:
            return
        with self.phases("evaluate"):
            scores = self._scores(whole=True)
        self.before = scores.losses
        if scores.part is not None:
            self.before_part, self.part_tokens = scores.part.losses, scores.part.tokens
        state = self.progress.state
        at = {"step": state.step, "tokens": state.tokens, "time": time.time(), "attempt": state.attempt}
        self.log(at | self._completed(scores))

    def after_step(self, record: Record) -> None:
        """Evaluates where that is due, and at the end; not for a stop, which should not take long."""
        progress = self.progress
        at_the_end = progress.complete and not progress.stopping
        if not at_the_end and not progress.due(progress.settings.evaluate_every):
            return
        with self.phases("evaluate"):
            record |= self._completed(self._scores(at_the_end))
            record |= self.averaged(at_the_end)
            batch = self.batches.batch(self.seed, progress.state.step - 1, progress.state.skips)
            record["documents"] = document_lengths([s.starts[s.counted] for s in batch])

    def averaged(self, whole: bool = True) -> Record:
        """Returns held-out loss and accuracy of the averaged weights, {} where there are none. Collective."""
        if self.average is None:
            return {}
        with self.average.swapped():
            loss, accuracy = self._scores(whole).overall
        return {"heldout_loss_average": loss, "heldout_accuracy_average": accuracy}

    def _scores(self, whole: bool) -> Heldout:
        tokens = self.progress.settings.evaluate_tokens
        return heldout(self.executor, self.batches, self.plan, tokens=tokens, whole=whole, at_once=self.at_once)

    def _completed(self, scores: Heldout) -> Record:
        record = scores.record()
        before = self.before if scores.whole else self.before_part if self.part_tokens == scores.tokens else None
        if before is not None:
            record |= drift(before, scores, self.batches.sides)
        if size := self.bytes_per_target[0 if scores.whole else 1]:
            record["heldout_bits_per_byte"] = scores.overall.loss / math.log(2) / size
        return record


def document_lengths(starts: Sequence[np.ndarray]) -> list[list[int]]:
    """Returns how many pieces of documents have at most so many tokens: [limit, count], limits the powers of two in
    use.

    starts: bool [L] of each packed sequence, True where a piece begins. A limit counts what is above the one before.
    """
    lengths = [length for s in starts for length in pieces(s)]
    counts = Counter((length - 1).bit_length() for length in lengths)
    return [[1 << power, counts[power]] for power in range(min(counts), max(counts) + 1)]
