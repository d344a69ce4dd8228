"""The answer to a step that the guard has held back: says so, passes over its batch; goes back, or ends."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from data.pack import Packed
from parallel.mesh import Groups
from parallel.schedule.plan import Plan
from parallel.schedule.static import Static
from train.checkpoints import checkpoint
from train.execute import Executor
from train.guards.step_guard import TokenRun, Watched, first_parameter, in_window, name, save_batch, suspects
from train.hooks import Record
from train.state import State, TrainProgress

ALERT = "guard"
NAMED, PROBED = 3, 16  # groups of which a document is named, and documents that are looked at for it


@dataclass(kw_only=True)
class Rollback:
    """Passes over batches, and takes a run back to a checkpoint.

    split: data groups, and ranks of a sequence. load: fills everything from a checkpoint and returns its manifest.
    tell: takes a line for people; silent but on rank 0. settle: waits for a checkpoint that is being written.
    """

    run_dir: Path
    progress: TrainProgress
    seed: int
    model: nn.Module
    optimizer: Optimizer
    batches: Any
    executor: Executor
    groups: Groups
    split: tuple[int, int]
    load: Callable[[Path], dict[str, Any]]
    tell: Callable[[str], None]
    settle: Callable[[], None] = lambda: None

    def skip(self, plan: Plan, batch: Any, windows: Any, loss: float, norm: float, rate: float) -> Record:
        """Passes over the batch of a step that was held back, and returns the step's record. Collective.

        batch: the sequences of the plan. windows: those that the batch was read as.
        """
        state = self.progress.state
        finite = math.isfinite(loss) and math.isfinite(norm)
        where, whose = (None, "") if finite else self._first(plan, batch, windows)
        self.optimizer.zero_grad()
        step, place = state.step + 1, state.place
        self.progress.skipped()
        why = f"loss {loss:.4g}, gradient norm {norm:.4g}" + (f": not finite first in {where}{whose}" if where else "")
        line = f"step {step}: batch {place} passed over, {why}"
        record: Record = {
            "step": step,
            "tokens": state.tokens,
            "attempt": state.attempt,
            "loss": loss,
            "grad_norm": norm,
        }
        record |= {"lr": rate, "skips": state.skips, "skipped": {"batch": place, "finite": finite}}
        if where is not None:
            record["skipped"]["first"] = where + whose
        if self.groups.first:
            saved = save_batch(self.run_dir / "skipped", f"batch-{place}", windows)
            line += f"; saved as {saved.relative_to(self.run_dir)}"
        self.tell(line)
        return record

    def due(self) -> bool:
        """Returns whether as many of the last batches were passed over as are too many."""
        own, state = self.progress.settings.guard, self.progress.state
        since = max(state.place - own.window, state.since)
        return sum(max(end - max(begin, since), 0) for begin, end in state.skipped) >= own.skips

    def go_back(self) -> None:
        """Loads the newest checkpoint from before the batches that were passed over, and passes over all data up to
        here.

        Raises FloatingPointError where there is none, or the run went back too often. Collective.
        """
        own, state = self.progress.settings.guard, self.progress.state
        place = state.place
        many = f"{own.skips} of the last {own.window} batches were passed over"
        if state.rollbacks >= own.rollbacks:
            raise FloatingPointError(
                f"{many}, and the run went back {state.rollbacks} times: step {state.step} is its end"
            )
        self.settle()
        begin = next(begin for begin, end in state.skipped if end > max(place - own.window, state.since))
        good: list[Any] = [self._good(begin) if self.groups.first else None]
        dist.broadcast_object_list(good)
        if good[0] is None:
            raise FloatingPointError(f"{many}, and there is no checkpoint from before batch {begin} to go back to")
        facts = self.load(good[0])
        self.progress.state = back = State.of(facts)
        back.attempt, back.rollbacks = state.attempt + 1, state.rollbacks + 1
        back.scale = facts.get("scale", 1.0) * own.backoff ** (back.rollbacks - facts.get("rollbacks", 0))
        back.padding = state.padding  # all batches up to here were read
        back.skip(place)
        back.since = place
        if self.groups.first:  # those that came later are of what went wrong
            checkpoint.prune(self.run_dir / "checkpoints", back.step, keep=self.progress.settings.keep)
        self.tell(
            f"{many}: back to {good[0].name}, batches {back.skipped[-1][0]} to {place - 1} passed over, learning rate "
            f"times {back.scale:g}"
        )

    def _first(self, plan: Plan, batch: Any, windows: Any) -> tuple[str, str]:
        """Returns where something was first not finite: forward, whose layers run again, and of which documents; else
        backward, by what it has left. Collective."""
        pipeline = self.executor.pipeline
        comm = self.groups.layers_comm
        parameter = first_parameter(self.model, comm, pipeline)
        if pipeline is not None:  # no rank has all layers to run again
            return (f"the gradient of {parameter}" if parameter else "the loss"), ""
        layers = {f"layers.{name}": layer for name, layer in self.model.layers.items()}  # type: ignore[operator, union-attr]
        with Watched(layers) as watched:
            (depths,) = self.executor.by_token(plan, batch, watched.read)
            deepest = int(depths.max())
            if not deepest:
                return (f"the gradient of {parameter}" if parameter else "the loss"), ""
            groups = suspects(plan, batch, (depths == deepest).cpu().numpy())
            first = [origin(self.executor, watched, batch, group, plan.step, self.split) for group in groups[:NAMED]]
        held, first = self._held(), [in_window(piece, batch[piece.sequence]) for piece in first]
        names = [name(piece, windows[piece.sequence], held and held[piece.sequence]) for piece in first]
        more = [f"{len(groups) - NAMED} more"] if len(groups) > NAMED else []
        return watched.name(deepest) or "the loss", "".join(f", {each}" for each in (*names, *more))

    def _held(self) -> list[Any] | None:
        """Returns each sequence's store, that one's name, and its pieces; None of a generated task."""
        if not hasattr(self.batches, "slots"):
            return None
        slots = self.batches.slots(self.progress.state.step, self.progress.state.skips)
        return [(slot.part.source.store, slot.part.source.name, slot.pieces(self.seed)) for slot in slots]

    def _good(self, begin: int) -> Path | None:
        """Returns the newest whole checkpoint that has read nothing from batch `begin` on."""
        for path in reversed(checkpoint.complete(self.run_dir / "checkpoints")):
            try:
                checkpoint.verify(path)
                facts = checkpoint.manifest(path)
            except checkpoint.DamagedError:
                continue
            if facts["step"] + facts["skips"] <= begin:
                return path
        return None


def origin(
    executor: Executor, watched: Watched, batch: Any, group: list[TokenRun], step: int, split: tuple[int, int]
) -> TokenRun:
    """Returns which of a group's documents is not finite by itself, the first where none of the first few is: inside a
    chunk of tokens, a zero times what is not finite reaches its neighbours on either side. Collective.

    split: data groups, and ranks of a sequence.
    """
    for piece in group[:PROBED]:
        part, among = batch[piece.sequence], slice(piece.begin, piece.end)
        length = piece.end - piece.begin
        alone = Packed(tokens=part.tokens[among], targets=part.targets[among], starts=np.arange(length) == 0)
        plan = Static(layout="contiguous").plan(step, [length], data=split[0], sequence=split[1])
        if executor.by_token(plan, [alone], watched.read).any():
            return piece
    return group[0]
