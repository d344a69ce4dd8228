"""The guard that keeps a harmful step from the weights: a gradient that is not finite, a loss far off the others.

The decision is a tensor on the device, made of numbers that all ranks share, and gates the update there: nothing waits
for the host until the step's metrics are read anyway. A step that is held back leaves weights, moments and counts as
they were, and its batch is passed over. When too many of the last steps were, the run goes back to a checkpoint from
before them, passes over all data up to here, and goes on with a smaller rate; after some times of that it ends.

Limits as in OLMo-core's skipped steps: mean and standard deviation of a window, once it is half full. A value beyond
the limit enters the window as the limit, so that one far off does not hide the next, and a lasting change is accepted
in time.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.collectives import Comm
from parallel.parallelize import parameter_name
from parallel.pipeline.runner import Pipeline
from parallel.schedule.plan import Plan
from parallel.shards import local
from train.hooks import Hook
from train.settings import GuardSettings

LEAST = 1e-3  # of the mean: a window that hardly moves has at least this standard deviation
PURPOSE = "guard"
ROWS = ("tokens", "targets", "starts")


@dataclass
class Guard(Hook):
    """settings: `train.guard`. comm: all ranks. seen: the window's losses and gradient norms, float64 [2, W], NaN where
    it is not filled; `decided` counts what has entered. held: whether the last step was held back, bool []."""

    key: ClassVar[str] = "guard"

    settings: GuardSettings
    comm: Comm
    device: torch.device
    seen: Tensor = field(init=False)
    decided: int = 0
    held: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.seen = torch.full((2, self.settings.window), math.nan, dtype=torch.float64, device=self.device)
        self.held = torch.zeros((), dtype=torch.bool, device=self.device)

    def decide(self, cross_entropy: Tensor, targets: int, norm: Tensor) -> Tensor:
        """Says whether the step is held back, bool [], the same on every rank. Collective where limits are asked for.

        cross_entropy: this rank's part of the step's sum. targets: of all ranks. norm: of all gradients.
        """
        norm = norm.double()
        self.held = ~torch.isfinite(norm)
        if self.settings.sigma is None or not targets:
            return self.held
        loss = self.comm.all_reduce(cross_entropy.double().view(1), purpose=PURPOSE)[0] / targets
        now = torch.stack([loss, norm.to(loss.device)])
        limits = self._limits(self.settings.sigma)
        self.held = ~torch.isfinite(now).all() | (now > limits).any()
        entering = torch.where(torch.isfinite(now), torch.minimum(now, limits), math.nan)
        self.seen[:, self.decided % self.settings.window] = entering
        self.decided += 1
        return self.held

    def _limits(self, sigma: float) -> Tensor:
        """The limits of loss and norm, float64 [2]; infinite until the window is half full."""
        there = torch.isfinite(self.seen)
        count = there.sum(1)
        values = torch.where(there, self.seen, 0.0)
        mean = values.sum(1) / count
        spread = torch.where(there, values - mean[:, None], 0.0).square().sum(1) / count
        limits = mean + sigma * torch.maximum(spread.sqrt(), LEAST * mean.abs())
        return torch.where(2 * count >= self.settings.window, limits, math.inf)

    def state(self) -> dict[str, Any]:
        """Returns the window; {} where there is none."""
        if self.settings.sigma is None:
            return {}
        return {"decided": self.decided, "seen": [[x if x == x else None for x in row] for row in self.seen.tolist()]}

    def load(self, state: dict[str, Any]) -> None:
        """Takes the window of a checkpoint; begins a fresh one where that has none, or one of another length."""
        rows = state.get("seen") or []
        if rows and len(rows[0]) == self.settings.window:
            self.seen.copy_(torch.tensor([[math.nan if x is None else x for x in row] for row in rows]).double())
            self.decided = state["decided"]
        else:
            self.seen.fill_(math.nan)
            self.decided = 0


def apply(optimizer: Optimizer, held: Tensor) -> None:
    """A step of the optimizer, unless it is `held` back, bool []. torch's fused kernels look at the flag themselves, on
    the device; for any other optimizer the host reads it."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = held.to(torch.float32)  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    elif not held.item():
        optimizer.step()


def first_parameter(model: nn.Module, comm: Comm, pipeline: Pipeline | None = None) -> str | None:
    """The weight nearest the loss, where a backward pass begins, with a gradient that is not finite. Collective.

    comm: the ranks that share the weights. pipeline: whose later ranks are nearer the loss, None without one.
    """
    nearest = _nearest(model, comm)
    if pipeline is None:
        return nearest
    ranks: list[str | None] = [None for _ in pipeline.comm.ranks]
    dist.all_gather_object(ranks, nearest, group=pipeline.comm.group)
    return next((name for name in reversed(ranks) if name is not None), None)


def _nearest(model: nn.Module, comm: Comm) -> str | None:
    named = [(parameter_name(name), p.grad) for name, p in model.named_parameters() if p.grad is not None]
    bad = torch.stack([~torch.isfinite(local(grad)).all() for _, grad in named]).double()
    ranks = comm.all_reduce(bad, purpose=PURPOSE).nonzero().flatten().tolist()
    return named[ranks[-1]][0] if ranks else None


class Watched:
    """Notes, in forward passes, where each token is first not finite. Takes its hooks away when it is left."""

    def __init__(self, layers: Any):
        self.names = list(layers)
        self._layers = list(layers.values())
        self._depth: Tensor | None = None

    def __enter__(self) -> "Watched":
        self._hooks = [
            layer.register_forward_hook(lambda module, args, output, i=i: self._see(i, output))
            for i, layer in enumerate(self._layers)
        ]
        return self

    def __exit__(self, *raised: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, i: int, output: Any) -> None:
        y_BTD = output[0] if isinstance(output, tuple | list) else output
        bad_BT = ~torch.isfinite(y_BTD).all(-1)
        depth_BT = torch.zeros_like(bad_BT, dtype=torch.int64) if not i or self._depth is None else self._depth
        self._depth = torch.where(bad_BT & (depth_BT == 0), len(self.names) + 1 - i, depth_BT)

    def read(self, output: Any) -> list[Tensor]:
        """[B, T] of the pass that gave this output: 0 where a token is finite throughout, else the more, the earlier it
        is not; 1 where only its loss is not."""
        assert self._depth is not None
        bad_BT = ~torch.isfinite(output.nats).view_as(self._depth)
        return [torch.where(bad_BT & (self._depth == 0), 1, self._depth)]

    def name(self, depth: int) -> str | None:
        """The name of the layer of such a number; None for the loss, or nothing."""
        return self.names[len(self.names) + 1 - depth] if depth > 1 else None


class TokenRun(NamedTuple):
    """Tokens [begin, end) of a sequence of the batch, of one document."""

    sequence: int
    begin: int
    end: int


def suspects(plan: Plan, batch: Any, bad: Any) -> list[list[TokenRun]]:
    """In each group of the plan the documents that have tokens which are not finite, in its order; none of padding.

    bad: bool [N], of the tokens of the batch, end to end.
    """
    begins, names = np.cumsum([0, *plan.lengths]), []
    for group in (group for micro in plan.micro_steps for group in micro.groups):
        own = []
        for s in group.sequences:
            held, counted = bad[begins[s] : begins[s + 1]], int(batch[s].counted.sum())
            edges = [*np.flatnonzero(batch[s].starts[:counted]).tolist(), counted]
            own += [TokenRun(s, a, b) for a, b in pairwise(edges) if held[a:b].any()]
        names.append(own)
    return [own for own in names if own]


def in_window(piece: TokenRun, sequence: Any) -> TokenRun:
    """The same tokens by their place in the packed sequence that a piece came from (`data.pack.unpacked`)."""
    if (origin := getattr(sequence, "origin", None)) is None:
        return piece
    return TokenRun(origin.sequence, origin.begin + piece.begin, origin.begin + piece.end)


def name(piece: TokenRun, packed: Any, held: Any) -> str:
    """A document's number in its store, where there is one.

    held: the sequence's store, that one's name, and its pieces [n, 2] there; None of a generated task.
    """
    if held is None:
        return f"document {int(packed.starts[: piece.begin + 1].sum()) - 1} of sequence {piece.sequence}"
    store, source, pieces = held
    nth = int(np.searchsorted(np.cumsum(pieces[:, 1] - pieces[:, 0]), piece.begin, side="right"))
    number = int(np.searchsorted(store.offsets, pieces[nth, 0], side="right")) - 1
    return f"document {number}{f' of {source}' if source else ''} in sequence {piece.sequence}"


def save_batch(folder: Path, name: str, batch: Any) -> Path:
    """Tokens, targets and starts of a batch, as arrays without pickles: `folder/name.npz`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.npz"
    rows: dict[str, Any] = {key: np.concatenate([getattr(s, key) for s in batch]) for key in ROWS}
    np.savez_compressed(path, **rows, lengths=np.array([len(s.tokens) for s in batch]))
    return path
