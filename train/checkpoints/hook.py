"""The hook that writes a run's checkpoints, and hands one back to all hooks."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from parallel.pipeline.runner import Pipeline
from parallel.tensor import division_of
from train.checkpoints import checkpoint, saving
from train.checkpoints.background import Background
from train.checkpoints.saving import Contents
from train.guards.hang_timeout import Patience
from train.hooks import Hook, Hooks, Record
from train.metrics.timing import PhaseTimes
from train.state import TrainProgress


@dataclass(kw_only=True)
class Checkpoints(Hook):
    """Writes checkpoints at the steps at which they are due, and at the end, a stop included.

    One that is not the last is written beside training, unless `train.checkpoint_async` is false: it is told of at the
    end of the step in which all ranks find it complete. A failed one ends the run there, and was never a checkpoint.
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
    background: Background = field(default_factory=Background)
    record: Record = field(default_factory=dict)  # of the step whose checkpoint is being written

    def after_step(self, record: Record) -> None:
        if self.background.writing and self.background.ended():
            self.settle()
        if self.progress.ended:
            self.written(self.save(), record)
        elif self.progress.due(self.progress.settings.checkpoint_every):
            if self.progress.settings.checkpoint_async:
                self.begin(record)
            else:
                self.written(self.save(), record)

    def on_skip(self, record: Record) -> None:
        if self.progress.stopping:
            self.written(self.save(), record)

    def after_run(self) -> None:
        if self.progress.stopping:
            step = self.progress.state.step
            self.say(f"stopped after step {step}, saved as checkpoints/step-{step}")

    def on_failure(self, error: BaseException) -> None:
        """Lets a checkpoint that is being written come to its end, where the other ranks do."""
        if (path := self.background.abandon()) is not None:
            self._tell(path)
            self.written(path, self.record)

    def save(self) -> Path:
        """Writes a checkpoint of this step and returns its folder. Collective."""
        self.settle()
        with self.phases("checkpoint"), self.patience.during("writing a checkpoint"):
            path = self._write(self._facts(), self._contents())
        self._tell(path)
        return path

    def begin(self, record: Record) -> None:
        """Begins to write a checkpoint of this step, which has this record, beside the steps that follow. Collective.

        It waits for the one before.
        """
        self.settle()
        with self.phases("checkpoint"), self.patience.during("copying a checkpoint"):
            self.record = record
            self.background.begin(self._contents(), partial(self._write, self._facts()))

    def settle(self) -> None:
        """Waits for the checkpoint that is being written, if any, and tells of it. Raises what its writing has.
        Collective."""
        if not self.background.writing:
            return
        with self.phases("checkpoint"), self.patience.during("writing a checkpoint"):
            path = self.background.wait()
        self._tell(path)
        self.written(path, self.record)

    def _facts(self) -> dict[str, Any]:
        """Returns what the manifest says of this moment; nothing that is changed later changes it."""
        state = self.progress.state
        facts = {**state.facts(), **self.facts, **self.hooks.state()}
        facts["rope_theta"] = self.batches.rope_theta(max(state.step - 1, 0), state.skips)
        return json.loads(json.dumps(facts))

    def _contents(self) -> Contents:
        """Raises FloatingPointError on every rank for weights that are not finite: such a checkpoint would be the
        newest, the one that a run goes on from, and the end of one that trained on nothing else would look good."""
        pipeline = None if self.pipeline is None else self.pipeline.comm
        held = saving.contents(self.model, self.optimizer, self.hooks.tensors(), pipeline)
        if (name := saving.not_finite(held)) is not None:
            step = self.progress.state.step
            raise FloatingPointError(f"{name} is not finite after step {step}: no checkpoint is made of it")
        return held

    def _write(self, facts: dict[str, Any], held: Contents, group: dist.ProcessGroup | None = None) -> Path:
        keep = self.progress.settings.keep
        return saving.write(self.folder, held, facts, keep=keep, companions=self.companions, group=group)

    def _tell(self, path: Path) -> None:
        self.say(f"checkpoint {path.relative_to(self.folder.parent)}")

    def go_back(self, path: Path) -> dict[str, Any]:
        """Fills weights, optimizer and the states of all hooks from a checkpoint of this run; returns its manifest.
        Collective."""
        with self.phases("checkpoint"), self.patience.during("going back to a checkpoint"):
            facts = checkpoint.load(path, self.model, self.optimizer)
            self.hooks.load(facts, path, division_of(self.model))
        return facts
