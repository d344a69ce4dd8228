"""The hook that writes a run's checkpoints, and hands one back to all hooks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from parallel.pipeline.runner import Pipeline
from parallel.tensor import division_of
from train.checkpoints import checkpoint
from train.guards.hang_timeout import Patience
from train.hooks import Hook, Hooks, Record
from train.metrics.timing import PhaseTimes
from train.state import TrainProgress


@dataclass(kw_only=True)
class Checkpoints(Hook):
    """Writes checkpoints at the steps at which they are due, and at the end, a stop included.

    hooks: all of the run, this one among them, whose states travel along. facts: what every manifest says of the run.
    companions: files that travel along, known to rank 0. written: takes the path of each and its step's record.
    """

    folder: Path
    model: nn.Module
    optimizer: Optimizer
    batches: Any
    progress: TrainProgress
    hooks: Hooks
    phases: PhaseTimes
    patience: Patience
    say: Callable[[str], None]
    written: Callable[[Path, Record], None]
    facts: dict[str, Any] = field(default_factory=dict)
    companions: Sequence[Path] = ()
    pipeline: Pipeline | None = None

    def after_step(self, record: Record) -> None:
        if self.progress.ended or self.progress.due(self.progress.settings.checkpoint_every):
            self.written(self.save(), record)

    def on_skip(self, record: Record) -> None:
        if self.progress.stopping:
            self.written(self.save(), record)

    def after_run(self) -> None:
        if self.progress.stopping:
            step = self.progress.state.step
            self.say(f"stopped after step {step}, saved as checkpoints/step-{step}")

    def save(self) -> Path:
        """Writes a checkpoint of this step and returns its folder. Collective."""
        state = self.progress.state
        with self.phases("checkpoint"), self.patience.during("writing a checkpoint"):
            facts = {**state.facts(), **self.facts, **self.hooks.state()}
            facts["rope_theta"] = self.batches.rope_theta(max(state.step - 1, 0), state.skips)
            path = checkpoint.save(
                self.folder,
                self.model,
                self.optimizer,
                facts,
                keep=self.progress.settings.keep,
                companions=self.companions,
                parts=self.hooks.tensors(),
                pipeline=None if self.pipeline is None else self.pipeline.comm,
            )
        self.say(f"checkpoint {path.relative_to(self.folder.parent)}")
        return path

    def go_back(self, path: Path) -> dict[str, Any]:
        """Fills weights, optimizer and the states of all hooks from a checkpoint of this run; returns its manifest.
        Collective."""
        with self.phases("checkpoint"), self.patience.during("going back to a checkpoint"):
            facts = checkpoint.load(path, self.model, self.optimizer)
            self.hooks.load(facts, path, division_of(self.model))
        return facts
