"""The training loop: a step takes a global batch, makes a plan, runs it, updates the weights, says what happened."""

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.moe import mixtures
from parallel.collectives import LEDGER
from parallel.mesh import Groups
from parallel.schedule.plan import MicroStep, Plan
from train.checkpoints import checkpoint
from train.evaluation.heldout import Heldout, drift, heldout
from train.execute import Executor, Tally
from train.guards import rollback
from train.guards.hang_timeout import Patience
from train.guards.step_guard import Guard, apply
from train.metrics import comm_record
from train.metrics.timing import PhaseTimes, Utilisation, peak_memory_bytes, pieces
from train.optim.average import Average
from train.optim.build import set_rate
from train.optim.clip import clip, layer_norms
from train.rope_base import rebase
from train.settings import TrainSettings
from train.state import State
from train.tracking import Tracker

NOTED = 32  # plans: lengths that come in turns, as those of a decomposition do, have one each


@dataclass(kw_only=True)
class Trainer:
    """Everything a step needs. Rank 0 has a tracker and measures utilisation; `say` is silent elsewhere."""

    settings: TrainSettings
    seed: int
    rate: float
    run_dir: Path
    model: nn.Module
    optimizer: Optimizer
    schedule: Any
    batches: Any
    scheduler: Any
    data: int
    sequence: int
    executor: Executor
    groups: Groups
    phases: PhaseTimes
    patience: Patience
    state: State
    say: Callable[[str], None]
    tracker: Tracker | None
    guard: Guard
    utilisation: Utilisation | None = None
    average: Average | None = None
    companions: Sequence[Path] = ()
    kept: dict[str, Any] = field(default_factory=dict)  # what a resumed run finds as it was
    published: dict[str, Any] | None = None  # of the folder of Hugging Face's that its weights first came from
    replays: bool = False  # whether the run starts from weights that may forget an old source
    before: dict[str, float] | None = None  # the loss on each source before the first step of a run that replays
    norms: bool = False  # whether those of each layer are recorded
    bytes_per_target: float | None = None  # of held-out text, on rank 0
    noted: tuple[tuple[MicroStep, ...], ...] = ()
    scored: tuple[Tensor, int] | None = None  # this step's cross-entropy on this rank, and the targets of all ranks

    def fit(self) -> None:
        """Trains to the end of the budget, or to the end of the step in which a stop is asked for."""
        if self.tracker is not None and self.state.attempt > 1:
            self.tracker.alert("goes on", f"attempt {self.state.attempt} goes on from step {self.state.step}", "INFO")
        try:
            self._train()
        except BaseException as error:
            self.patience.end()
            self._fail(error)
            raise

    def _train(self) -> None:
        started, saved = time.time(), self.state.step
        scores: Heldout | None = None
        stopping = False
        record: dict[str, Any] = {}
        if self.replays and self.before is None:
            self._look_back()
        while not self._complete() and not stopping:
            before = self.state.tokens
            record, stopping = self.step()
            if "skipped" in record and not stopping:
                self._log(record)
                if rollback.due(self):
                    rollback.go_back(self)
                continue
            ended = stopping or self._complete()
            tokens = self.state.tokens - before
            if ended and not stopping or self._due(self.settings.evaluate_every, tokens):
                with self.phases("evaluate"):
                    scores = heldout(self.executor, self.batches, self.plan)
                    record |= scores.record() | self._averaged()
                    record |= {} if self.before is None else drift(self.before, scores, self.batches.sides)
                    batch = self.batches.batch(self.seed, self.state.step - 1, self.state.skips)
                    record["documents"] = document_lengths([s.starts[s.counted] for s in batch])
            if ended or self._due(self.settings.checkpoint_every, tokens):
                path, saved = self.save(), self.state.step
                if self.tracker is not None:
                    self.tracker.checkpoint(path, {key: record[key] for key in ("step", "tokens", "loss")})
            self._log(record)
        self.patience.end()
        self._finish(record, scores, saved, started, stopping)

    def step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step. Returns its record, the same on every rank, and whether a stop was asked for."""
        began, cpu, state = time.perf_counter(), time.process_time(), self.state
        LEDGER.take()  # an evaluation before this step is not the step's
        with self.phases("data"):
            batch = self.batches.batch(self.seed, state.step, state.skips)
        with self.phases("plan"):
            rebase(self.model, self.batches.rope_theta(state.step, state.skips))
            plan = self.plan([len(s.tokens) for s in batch])
            self._note(plan)
            tokens = self._counted(batch)
        tally = self.executor.train(plan, batch)
        targets = sum(s.num_targets for s in batch)
        with self.phases("optimizer"):
            self.scored = tally.cross_entropy, targets
            rate, gradient_norm = self._update(self._middle(tokens, sum(plan.lengths)))
        shared = self._share(tally, time.process_time() - cpu)
        if shared["held"]:
            loss = shared["cross_entropy"] / max(targets, 1)
            return rollback.skip(self, plan, batch, loss, gradient_norm, rate), shared["stop"]
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.step(tokens)
        state.step += 1
        state.tokens += tokens
        state.places += sum(plan.lengths)
        for name, counts in shared["choices"].items():
            mixtures(self.model)[name].router.settle(counts)
        seconds = time.perf_counter() - began
        self.patience.stepped(seconds)
        record = {
            "step": state.step,
            "tokens": state.tokens,
            "time": time.time(),
            "attempt": state.attempt,
            "loss": shared["cross_entropy"] / max(targets, 1),
            "balance_loss": shared["balance"] / max(tokens, 1),
            "z_loss": shared["z"] / max(tokens, 1),
            "lr": rate,
            "grad_norm": gradient_norm,
            "tokens_per_second": tokens / seconds,
            "cpu_seconds": shared["cpu"],
            "memory_bytes": shared["memory"],
            "expert_load": {name: _shares(counts) for name, counts in shared["choices"].items()},
        }
        record |= self.by_layer | shared["communication"]
        if state.skips:
            record["skips"] = state.skips
        if len(drawn := self.batches.drawn(state.step, state.skips)) > 1:
            record["drawn"] = {name: places - state.padding.get(name, 0) for name, places in drawn.items()}
        if shared["dropped"]:
            record["expert_dropped"] = shared["dropped"]
        if self.utilisation is not None:
            record |= self.utilisation.of([s.starts[s.counted] for s in batch], seconds)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record[name]):
                raise FloatingPointError(f"{name} is {record[name]} at step {state.step}")
        return record, shared["stop"]

    def _middle(self, tokens: int, places: int) -> float:
        """Where the middle of a step stands in the budget: in tokens, or in places where that is of steps."""
        by_steps = self.settings.steps is not None
        return self.state.places + places / 2 if by_steps else self.state.tokens + tokens / 2

    def _update(self, middle: float) -> tuple[float, float]:
        """Clips and applies the step's gradients, unless the guard holds them back. Returns the learning rate at
        `middle` and the gradient norm before clipping."""
        own, comm = self.settings, self.groups.world_comm
        self.by_layer = layer_norms(self.model, comm) if self.norms else {}
        gradient_norm = clip(self.model, comm, largest=own.clip, each=own.clip_each, value=own.clip_value)
        assert self.scored is not None
        held = self.guard.decide(*self.scored, gradient_norm)
        rate = self.rate * self.state.scale * self.schedule.multiplier(middle, self.settings.total_tokens)
        set_rate(self.optimizer, rate)
        apply(self.optimizer, held)
        return rate, gradient_norm.item()

    def _counted(self, batch: Sequence[Any]) -> int:
        """The tokens of the step's batch; its padding is put down to the sources that it stands beside."""
        if any(s.padding for s in batch):
            for slot, s in zip(self.batches.slots(self.state.step, self.state.skips), batch, strict=True):
                name = slot.part.name
                self.state.padding[name] = self.state.padding.get(name, 0) + s.padding
        return sum(s.num_tokens for s in batch)

    def _complete(self) -> bool:
        return self.settings.complete(self.state.step, self.state.tokens)

    def plan(self, lengths: list[int]) -> Plan:
        """What the ranks will do with sequences of these lengths."""
        return self.scheduler.plan(self.state.step + 1, lengths, data=self.data, sequence=self.sequence)

    def save(self) -> Path:
        """Writes a checkpoint of this step and returns its folder. Collective."""
        with self.phases("checkpoint"), self.patience.during("writing a checkpoint"):
            facts = {**self.state.facts(), **self.kept, "seed": self.seed, "data": self.batches.fingerprint}
            facts |= {"order": self.batches.order, "guard": self.guard.facts()}
            facts |= {} if self.average is None else {"average": self.average.facts()}
            facts |= {} if self.before is None else {"before": self.before}
            facts |= {} if self.published is None else {"published": self.published}
            facts["rope_theta"] = self.batches.rope_theta(max(self.state.step - 1, 0), self.state.skips)
            path = checkpoint.save(
                self.run_dir / "checkpoints",
                self.model,
                self.optimizer,
                facts,
                keep=self.settings.keep,
                companions=self.companions,
                average=None if self.average is None else self.average.state(),
            )
        self.say(f"checkpoint {path.relative_to(self.run_dir)}")
        return path

    def _averaged(self) -> dict[str, float]:
        """Held-out loss and accuracy of the averaged weights, {} where there are none. Collective."""
        if self.average is None:
            return {}
        with self.average.swapped():
            scores = heldout(self.executor, self.batches, self.plan)
        return {
            "heldout_loss_average": scores.overall.loss,
            "heldout_accuracy_average": scores.overall.accuracy,
        }

    def _look_back(self) -> None:
        """What the weights know of each source before they are trained on: the record of step 0. Collective."""
        with self.phases("evaluate"):
            scores = heldout(self.executor, self.batches, self.plan)
        self.before = {name: means.loss for name, means in scores.sources.items()}
        at = {"step": self.state.step, "tokens": self.state.tokens, "time": time.time(), "attempt": self.state.attempt}
        self._log({**at, **scores.record(), **drift(self.before, scores, self.batches.sides)})

    def _note(self, plan: Plan) -> None:
        """Keeps every plan that no recent step had, as `plans/step-N.txt`."""
        if self.tracker is None or plan.micro_steps in self.noted:
            return
        self.noted = (*self.noted[-NOTED:], plan.micro_steps)
        folder = self.run_dir / "plans"
        folder.mkdir(exist_ok=True)
        (folder / f"step-{plan.step}.txt").write_text(plan.text() + "\n")

    def _due(self, every: int | None, tokens: int) -> bool:
        """Whether a step of so many tokens crossed a multiple of `every`."""
        before = self.state.tokens - tokens
        return every is not None and self.state.tokens // every > before // every

    def _share(self, tally: Tally, cpu: float) -> dict[str, Any]:
        """What the ranks tell each other at the end of a step, in one all-gather: sums, the stop flag, memory.

        cpu: seconds of processor time that this one took.
        """
        layers, limited = sorted(tally.load), sorted(tally.dropped)
        loads = [tally.load[name].double() for name in layers]
        sums = [tally.cross_entropy, tally.balance, tally.z, *(tally.dropped[name] for name in limited)]
        stop = float((self.run_dir / "stop").exists()) if self.groups.rank == 0 else 0.0
        memory = float(peak_memory_bytes(str(self.executor.device)))
        own = torch.tensor([stop, memory, cpu, 0.0], dtype=torch.float64, device=self.executor.device)
        own[3] = self.guard.held  # without a word from the device to the host
        received = torch.tensor(comm_record.taken(), dtype=torch.float64, device=self.executor.device)
        row = torch.cat([own, *(x.double().view(1) for x in sums), *loads, received])
        rows = self.groups.world_comm.all_gather(row, purpose="metrics")
        total = rows.sum(0)
        first = len(own) + len(sums)
        *counts, received = total[first:].split([*(len(load) for load in loads), comm_record.COLUMNS])
        choices = dict(zip(layers, counts, strict=True))
        cross_entropy, balance, z, *left_out = total[len(own) : first].tolist()
        dropped = dict(zip(limited, left_out, strict=True))
        return {
            "stop": bool(total[0] > 0),
            "held": bool(total[3] > 0),
            "memory": int(rows[:, 1].max()),
            "cpu": total[2].item(),
            "cross_entropy": cross_entropy,
            "balance": balance,
            "z": z,
            "choices": choices,
            "communication": comm_record.record(received.tolist()),
            "dropped": {name: count / choices[name].sum().clamp_min(1).item() for name, count in dropped.items()},
        }

    def _log(self, record: dict[str, Any]) -> None:
        with self.phases("logging"):
            if self.tracker is not None:
                if self.bytes_per_target and record.get("heldout_loss") is not None:
                    record["heldout_bits_per_byte"] = record["heldout_loss"] / math.log(2) / self.bytes_per_target
                self.tracker.log({**record, "seconds": self.phases.take()})

    def _finish(self, record: dict, scores: Heldout | None, saved: int, started: float, stopped: bool) -> None:
        if stopped:
            self.say(f"stopped after step {self.state.step}, saved as checkpoints/step-{saved}")
        if self.tracker is not None:
            summary = {"step": self.state.step, "tokens": self.state.tokens, "loss": record.get("loss")}
            summary |= {"heldout_loss": None, "heldout_accuracy": None} | (scores.record() if scores else {})
            kept = ("heldout", "forgetting", "adaptation")
            summary |= {key: value for key, value in record.items() if key.startswith(kept) and key not in summary}
            summary |= {"seconds": time.time() - started, "stopped": stopped}
            aside = self.run_dir / "summary.json.partial"
            aside.write_text(json.dumps(summary))
            aside.replace(self.run_dir / "summary.json")
            self.tracker.finish(summary)

    def _fail(self, error: BaseException) -> None:
        """Tells the tracker what ends the run. `error` goes up, not what else may break here."""
        if self.tracker is None:
            return
        line = (str(error).splitlines() or [""])[0]
        with contextlib.suppress(Exception):
            title = "not finite" if isinstance(error, FloatingPointError) else "failed"
            text = f"{type(error).__name__}: {line} (attempt {self.state.attempt}, step {self.state.step})"
            self.tracker.alert(title, text, "ERROR")
            self.tracker.finish({"step": self.state.step, "tokens": self.state.tokens, "error": text}, exit_code=1)


def document_lengths(starts: Sequence[np.ndarray]) -> list[list[int]]:
    """How many pieces of documents have at most so many tokens: [limit, count], limits the powers of two in use.

    starts: bool [L] of each packed sequence, True where a piece begins. A limit counts what is above the one before.
    """
    lengths = [length for s in starts for length in pieces(s)]
    found = Counter((length - 1).bit_length() for length in lengths)
    return [[1 << power, found[power]] for power in range(min(found), max(found) + 1)]


def _shares(counts: Tensor) -> list[float]:
    return (counts / counts.sum().clamp_min(1)).tolist()
