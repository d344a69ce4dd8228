"""The executor: runs a Plan's micro-steps on this rank. It knows only Plans."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from parallel.data import communicate_gradients
from parallel.mesh import Groups
from parallel.schedule.plan import Plan
from parallel.sequence.effects import Transport
from parallel.sequence.keys import Keys
from parallel.sequence.place import Packed, Placed, place
from train.loss import Sums, sums

Phase = Callable[[str], AbstractContextManager[None]]


def _no_clock(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Tally:
    """What a step adds up to over its micro-steps, on this rank: `train.loss.Sums`, without gradients.

    correct: targets that were the likeliest token, counted by `Executor.evaluate` only.
    """

    cross_entropy: Tensor
    balance: Tensor
    load: dict[str, Tensor]
    z: Tensor
    dropped: dict[str, Tensor]
    correct: Tensor

    def add(self, part: Sums) -> None:
        self.cross_entropy = self.cross_entropy + part.cross_entropy.detach()
        self.balance = self.balance + part.balance.detach()
        self.z = self.z + part.z.detach()
        if part.correct is not None:
            self.correct = self.correct + part.correct
        for mine, more in ((self.load, part.load), (self.dropped, part.dropped)):
            for name, choices in more.items():
                mine[name] = mine[name] + choices if name in mine else choices


@dataclass(frozen=True)
class Executor:
    """Placement, forward and, for training, backward of every micro-step."""

    model: nn.Module
    groups: Groups
    device: torch.device
    recurrence: Transport
    attention: Keys
    balance_weight: float
    phase: Phase = _no_clock
    z_weight: float = 0.0

    def train(self, plan: Plan, batch: Sequence[Packed]) -> Tally:
        """Accumulates the gradients of the step's objective into the model; they are reduced by the last micro-step."""
        targets = sum(int(np.count_nonzero(s.targets != -100)) for s in batch)
        tokens, tally = sum(plan.lengths), self._empty()
        for last, placed in self._places(plan, batch, step=plan.step):
            communicate_gradients(self.model, last)
            with self.phase("forward"):
                part = sums(self.model(placed.tokens, placed.seq, placed.targets))
            with self.phase("backward"):
                weights = {"balance_weight": self.balance_weight, "z_weight": self.z_weight}
                part.objective(targets=targets, tokens=tokens, **weights).backward()
            tally.add(part)
        return tally

    @torch.no_grad()
    def evaluate(self, plan: Plan, batch: Sequence[Packed]) -> Tally:
        """Forward only."""
        tally = self._empty()
        for _, placed in self._places(plan, batch):
            tally.add(sums(self.model(placed.tokens, placed.seq, placed.targets)))
        return tally

    def _places(self, plan: Plan, batch: Sequence[Packed], step: int | None = None) -> Iterator[tuple[bool, Placed]]:
        with self.phase("plan"):
            self.groups.prepare(plan)
        for m, micro in enumerate(plan.micro_steps):
            with self.phase("plan"):
                group = micro.group_of(self.groups.rank)
                comm = self.groups.comm(group.ranks)
                placed = place(
                    group,
                    batch,
                    comm,
                    device=self.device,
                    recurrence=self.recurrence,
                    attention=self.attention,
                    step=step,
                )
            yield m == len(plan.micro_steps) - 1, placed

    def _empty(self) -> Tally:
        nats, balance, z, count = torch.zeros(4, device=self.device).unbind()
        return Tally(nats, balance, {}, z, {}, count.long())
