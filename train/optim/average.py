"""Averages of the weights beside those that are trained: less noisy than the last ones, at the same learning rate.

ema: an exponential mean (Polyak averaging). A step of n tokens moves it towards the weights by 1 - exp(-n / tokens),
and by n over the tokens seen while that is more: until `tokens` of them have passed it is the plain mean.
last: the mean of the last `count` of the weights at every `tokens` tokens (LAWA, 2209.14981).

Everything is elementwise, on shards as they lie: no rank needs another's.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from models.precision import wide
from parallel.parallelize import parameter_name
from parallel.shards import ByParts, local
from train.hooks import Hook, Record
from train.optim.random_rounding import as_weight
from train.state import TrainProgress

MEAN = "mean"  # under this name a checkpoint has the averaged weights
Weights = dict[str, Tensor]


class Average(Hook):
    """The average of a model's parameters. kind: ema or last. tokens, count: see above. say: takes a notice."""

    key: ClassVar[str] = "average"

    def __init__(
        self, model: nn.Module, progress: TrainProgress, kind: str, tokens: int, count: int, say: Callable[[str], None]
    ):
        self.model, self.kind, self.tokens, self.count = model, kind, tokens, count
        self._progress, self._say = progress, say
        self.mean = _copied(self.weights) if kind == "ema" else {}
        self.snapshots: list[Weights] = []
        self.seen = self.taken = 0

    @property
    def weights(self) -> Weights:
        """This moment's: FSDP may move its shards to other memory at the first forward pass, and after one without a
        backward pass some weights are whole, to be cut again before they are anything else."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        with ByParts():
            return {parameter_name(name): p.detach() for name, p in self.model.named_parameters()}

    def after_step(self, record: Record) -> None:
        self.step(self._progress.tokens)

    @torch.no_grad()
    def step(self, tokens: int) -> None:
        """Takes in the weights after a step of so many tokens."""
        before, self.seen = self.seen, self.seen + tokens
        if self.kind == "ema":
            part = max(-math.expm1(-tokens / self.tokens), tokens / self.seen)
            means, weights = _locals(self.mean), _locals(self.weights)
            torch._foreach_lerp_(means, [x.to(mean.dtype) for mean, x in zip(means, weights, strict=True)], part)
        elif self.seen // self.tokens > before // self.tokens:
            if len(self.snapshots) < self.count:
                self.snapshots.append(_copied(self.weights))
            else:
                _fill(self.snapshots[self.taken % self.count], self.weights)
            self.taken += 1

    @torch.no_grad()
    def averaged(self) -> Weights:
        """The averages by name, sharded as the weights are. Before the first of `last` it is the weights themselves."""
        if self.kind == "ema":
            return self.mean
        if not self.snapshots:
            return self.weights
        mean = _copied(self.snapshots[0])
        for other in self.snapshots[1:]:
            torch._foreach_add_(_locals(mean), _locals(other))
        torch._foreach_div_(_locals(mean), float(len(self.snapshots)))
        return mean

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the averaged weights meanwhile, and afterwards its own again, bit for bit."""
        own = _copied(self.weights)
        _fill(self.weights, self.averaged())
        try:
            yield
        finally:
            _fill(self.weights, own)

    def tensors(self) -> dict[str, Any]:
        """Returns the averaged weights, and what they are made of."""
        return {MEAN: self.averaged(), "snapshots": {str(i): each for i, each in enumerate(self.snapshots)}}

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "seen": self.seen, "taken": self.taken, "snapshots": len(self.snapshots)}

    def load(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Goes on from the average of a checkpoint, or as it is where that has none of this kind.

        Snapshots that are more than are now asked for, or fewer, begin anew.
        """
        if not state or state["kind"] != self.kind or state["snapshots"] != min(state["taken"], self.count):
            if not self.seen and (step := self._progress.state.step):
                self._say(f"train.average={self.kind}: begins at step {step:,}: the checkpoint has no such average")
            return None
        self.seen, self.taken = state["seen"], state["taken"]
        self.snapshots = [_copied(self.weights) for _ in range(state["snapshots"])]
        parts = {"snapshots": {str(i): each for i, each in enumerate(self.snapshots)}}
        return parts if self.kind == "last" else {MEAN: self.mean}


def _locals(weights: Weights) -> list[Tensor]:
    return [local(x) for x in weights.values()]


def _copied(weights: Weights) -> Weights:
    """Copies in at least fp32: small steps towards the weights would be lost in bf16."""
    return {name: as_weight(x, wide(local(x)).clone()) for name, x in weights.items()}


@torch.no_grad()
def _fill(into: Weights, weights: Weights) -> None:
    torch._foreach_copy_(_locals(into), _locals(weights))
