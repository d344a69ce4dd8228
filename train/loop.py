"""The training loop: a step takes a global batch, makes a plan, runs it and updates the weights; hooks do the rest."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from models import delayed_scaling
from models.moe import mixtures
from parallel.collectives import LEDGER
from parallel.mesh import Groups
from parallel.schedule.plan import Plan
from parallel.sequence.place import targets_ahead
from train.engines.engine import EngineOptimizer
from train.execute import Executor
from train.guards.hang_timeout import Patience
from train.guards.rollback import Rollback
from train.guards.step_guard import Guard, apply
from train.hooks import Hooks, Record
from train.loss import mean_ahead
from train.metrics.step_totals import StepTotals, totals
from train.metrics.timing import PhaseTimes, Utilisation
from train.optim.build import set_rate
from train.optim.clip import clip, layer_norms
from train.rope_base import rebase
from train.state import State, TrainProgress


@dataclass(kw_only=True)
class Trainer:
    """Runs the steps of a run on this rank; `hooks` do all else, see `train.hooks`.

    rate: the optimizer's, before the schedule. plan: of sequences of these lengths in the next step. stop: the file by
    which a person asks for the end; rank 0 looks for it. utilisation: on rank 0, where a model's costs are known.
    norms: record those of each layer. planned: in place of `plan`, the sequences that a batch becomes, and their plan.
    computing: this rank's seconds in its layers since the last step, and observe: takes a plan and those of all ranks,
    where a planner asks for them.
    """

    progress: TrainProgress
    seed: int
    rate: float
    stop: Path
    model: nn.Module
    optimizer: Optimizer
    schedule: Any
    batches: Any
    plan: Callable[[list[int]], Plan]
    executor: Executor
    groups: Groups
    phases: PhaseTimes
    patience: Patience
    guard: Guard
    rollback: Rollback
    hooks: Hooks
    utilisation: Utilisation | None = None
    norms: bool = False
    planned: Callable[[list[Any]], tuple[list[Any], Plan]] | None = None
    computing: Callable[[], float] | None = None
    observe: Callable[[Plan, Sequence[float]], None] | None = None
    by_layer: Record = field(default_factory=dict)  # the norms of the last step

    @property
    def state(self) -> State:
        return self.progress.state

    def fit(self) -> None:
        """Trains to the end of the budget, or to the end of the step in which a stop is asked for."""
        try:
            self.hooks.before_run()
            while not self.progress.ended:
                self.advance()
            self.patience.end()
            self.hooks.after_run()
        except BaseException as error:
            self.patience.end()
            self.hooks.on_failure(error)
            raise

    def advance(self) -> Record:
        """Takes a step, and lets the hooks do what follows from it. Returns its record, as they have completed it."""
        record, self.progress.stopping = self.step()
        if "skipped" not in record:
            self.hooks.after_step(record)
            return record
        self.hooks.on_skip(record)
        if not self.progress.stopping and self.rollback.due():
            self.rollback.go_back()
        return record

    def step(self) -> tuple[Record, bool]:
        """Takes one optimizer step. Returns its record, the same on every rank, and whether a stop was asked for."""
        began, cpu, state = time.perf_counter(), time.process_time(), self.state
        LEDGER.take()  # an evaluation before this step is not the step's
        with self.phases("data"):
            windows = self.batches.batch(self.seed, state.step, state.skips)
        with self.phases("plan"):
            rebase(self.model, self.batches.rope_theta(state.step, state.skips))
            if self.planned:
                batch, plan = self.planned(windows)
            else:
                batch, plan = windows, self.plan([len(s.tokens) for s in windows])
            self.hooks.before_step(plan)
            tokens, places = self._count(windows), sum(len(s.tokens) for s in windows)
        tally = self.executor.train(plan, batch)
        targets = sum(s.num_targets for s in windows)
        with self.phases("optimizer"):
            middle = self.progress.middle(tokens, places)
            rate, gradient_norm = self._update(middle, tally.cross_entropy, targets)
        stop_asked = self.groups.first and self.stop.exists()
        cpu = time.process_time() - cpu
        computing = self.computing() if self.computing else 0.0
        magnitudes, device = delayed_scaling.present(self.model), self.executor.device
        sums = totals(tally, self.guard.held, stop_asked, cpu, device, self.groups, computing, magnitudes)
        loss = sums.cross_entropy / max(targets, 1)
        if sums.held:
            delayed_scaling.forget(self.model)
            return self.rollback.skip(plan, batch, windows, loss, gradient_norm, rate), sums.stop
        self.optimizer.zero_grad()
        self.progress.stepped(tokens, places)
        own = mixtures(self.model)  # of this pipeline rank
        for name in own.keys() & sums.choices.keys():
            own[name].router.settle(sums.choices[name])
        if sums.magnitudes is not None:
            delayed_scaling.settle(self.model, sums.magnitudes)
        seconds = time.perf_counter() - began
        self.patience.stepped(seconds)
        if self.observe:
            self.observe(plan, sums.computing)
        return self._record(windows, sums, loss, gradient_norm, rate, seconds), sums.stop

    def _update(self, middle: float, cross_entropy: Tensor, targets: int) -> tuple[float, float]:
        """Clips and applies the step's gradients, unless the guard holds them back.

        middle: where the step stands in the budget. cross_entropy: this rank's part of the sum over all `targets`.
        Returns the learning rate, and the gradient norm before clipping.
        """
        own, pipeline = self.progress.settings, self.executor.pipeline
        comm = self.groups.layers_comm
        self.by_layer = layer_norms(self.model, comm, pipeline) if self.norms else {}
        if isinstance(self.optimizer, EngineOptimizer):
            gradient_norm = self.optimizer.clip(own.clip)
        else:
            limits = {"each": own.clip_each, "value": own.clip_value}
            gradient_norm = clip(self.model, comm, largest=own.clip, **limits, pipeline=pipeline)
        held = self.guard.decide(cross_entropy, targets, gradient_norm)
        rate = self.rate * self.state.scale * self.schedule.multiplier(middle, own.total_tokens)
        set_rate(self.optimizer, rate)
        apply(self.optimizer, held)
        return rate, gradient_norm.item()

    def _count(self, batch: Sequence[Any]) -> int:
        """Returns the tokens of the step's batch; its padding is put down to the sources that it stands beside."""
        if any(s.padding for s in batch):
            for slot, s in zip(self.batches.slots(self.state.step, self.state.skips), batch, strict=True):
                name = slot.part.name
                self.state.padding[name] = self.state.padding.get(name, 0) + s.padding
        return sum(s.num_tokens for s in batch)

    def _record(
        self, batch: Sequence[Any], sums: StepTotals, loss: float, gradient_norm: float, rate: float, seconds: float
    ) -> Record:
        """Returns what metrics.jsonl says of a step. Raises FloatingPointError for a loss or a norm that is none."""
        state, tokens = self.state, self.progress.tokens
        record: Record = {
            "step": state.step,
            "tokens": state.tokens,
            "time": time.time(),
            "attempt": state.attempt,
            "loss": loss,
            "balance_loss": sums.balance / max(tokens, 1),
            "z_loss": sums.z / max(tokens, 1),
            "lr": rate,
            "grad_norm": gradient_norm,
            "tokens_per_second": tokens / seconds,
            "cpu_seconds": sums.cpu,
            "memory_bytes": sums.memory,
            "expert_load": {name: (n / n.sum().clamp_min(1)).tolist() for name, n in sums.choices.items()},
        }
        record |= self.by_layer | sums.communication
        if self.executor.teacher is not None:
            record["distill_loss"] = sums.divergence / max(sum(s.num_targets for s in batch), 1)
        if sums.index_loss:
            record["index_loss"] = sums.index_loss / max(tokens, 1)
        if sums.ahead:
            record["mtp_loss"] = mean_ahead(sums.ahead, targets_ahead(batch, len(sums.ahead)))
        if state.skips:
            record["skips"] = state.skips
        if len(drawn := self.batches.drawn(state.step, state.skips)) > 1:
            record["drawn"] = {name: places - state.padding.get(name, 0) for name, places in drawn.items()}
        if sums.dropped:
            record["expert_dropped"] = sums.dropped
        if self.utilisation is not None:
            record |= self.utilisation.of([s.starts[s.counted] for s in batch], seconds)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record[name]):
                raise FloatingPointError(f"{name} is {record[name]} at step {state.step}")
        return record
