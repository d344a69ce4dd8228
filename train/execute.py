"""The executor: runs a Plan's micro-steps on this rank. It knows only Plans."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.lm import Output
from models.recipes import LowPrecision
from models.sequence import Memory
from parallel.activation_memory import recompute_group
from parallel.collectives import Comm
from parallel.fsdp import communicate_gradients
from parallel.mesh import Groups
from parallel.pipeline.runner import Pipeline
from parallel.schedule import time_spans
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.schedule.time_spans import Shape
from parallel.sequence.attention import Keys
from parallel.sequence.place import PackedSequence, Placed, place, targets_ahead
from parallel.sequence.states import Transport
from parallel.tensor import sum_undivided_gradients
from train.distill import Teacher
from train.engines.engine import EngineOptimizer
from train.loss import LossSums, distilled, sums
from train.time_spans import Passage, Spans

Phase = Callable[[str], AbstractContextManager[None]]


def largest_of(comm: Comm, magnitudes: Tensor) -> Tensor:
    """The largest of each number over the ranks."""
    return comm.all_gather(magnitudes.contiguous(), purpose="scales").amax(0)


def _no_clock(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Tally:
    """The sums of a step over its micro-steps, on this rank: `train.loss.LossSums`, without gradients.

    correct: targets that were the likeliest token, counted by `Executor.evaluate` only. ahead: [M], of training only.
    """

    cross_entropy: Tensor
    balance: Tensor
    load: dict[str, Tensor]
    z: Tensor
    dropped: dict[str, Tensor]
    correct: Tensor
    divergence: Tensor
    ahead: Tensor
    index_loss: Tensor

    def add(self, part: LossSums) -> None:
        self.cross_entropy = self.cross_entropy + part.cross_entropy.detach()
        self.balance = self.balance + part.balance.detach()
        self.z = self.z + part.z.detach()
        if part.correct is not None:
            self.correct = self.correct + part.correct
        if part.divergence is not None:
            self.divergence = self.divergence + part.divergence
        if part.index_loss is not None:
            self.index_loss = self.index_loss + part.index_loss
        if part.ahead is not None:
            self.ahead = self.ahead + part.ahead.detach()
        for mine, more in ((self.load, part.load), (self.dropped, part.dropped)):
            for name, choices in more.items():
                mine[name] = mine[name] + choices if name in mine else choices


@dataclass(frozen=True)
class Executor:
    """Placement, forward and, for training, backward of every micro-step; through the stages of a pipeline, if any."""

    model: nn.Module
    groups: Groups
    device: torch.device
    recurrence: Transport
    attention: Keys
    balance_weight: float
    phase: Phase = _no_clock
    z_weight: float = 0.0
    spans: Spans | None = None
    passed: Callable[[int, int], None] = lambda done, of: None  # of spans in time, see `Passage`
    pipeline: Pipeline | None = None
    experts: Mapping[str, int] = field(default_factory=dict)  # by layer, those of all stages of a pipeline
    limited: Sequence[str] = ()  # those of them whose experts have a capacity
    engine: EngineOptimizer | None = None  # that does more than FSDP inside the model does
    low: LowPrecision | None = None  # a recipe whose scales are those of all ranks of a group
    teacher: Teacher | None = None  # that gives the objective in the cross-entropy's place
    mtp: int = 0  # modules that predict tokens ahead, which training alone runs
    mtp_weight: float = 0.0
    index_weight: float = 1.0

    def train(self, plan: Plan, batch: Sequence[PackedSequence]) -> Tally:
        """Accumulates the gradients of the step's objective into the model; they are reduced by the last micro-step."""
        targets = sum(int(np.count_nonzero(s.targets != -100)) for s in batch)
        tokens, tally = sum(int(np.count_nonzero(s.counted)) for s in batch), self._empty()
        ahead = targets_ahead(batch, self.mtp)
        factor = 1.0 if self.engine is None else self.engine.factor
        index_weight = factor * self.index_weight / max(tokens, 1)

        def objective(part: LossSums) -> Tensor:
            weights = {"balance_weight": self.balance_weight, "z_weight": self.z_weight, "mtp_weight": self.mtp_weight}
            return part.objective(targets=targets, tokens=tokens, targets_ahead=ahead, **weights)

        micro_steps = self._micro_steps(plan, batch)
        if self.pipeline is not None:
            whole = (self._in_time(plan, micro) for _, micro in micro_steps)
            placed = [
                self._place(group, batch, shapes, step=plan.step, index_weight=index_weight)
                for (group,), (shapes,) in whole
            ]
            for output in self.pipeline.train(plan, placed, lambda output: objective(sums(output))):
                tally.add(sums(output))
            sum_undivided_gradients(self.model)
            return tally
        for last, micro in micro_steps:
            for part in self._run(plan, micro, batch, objective, last, index_weight):
                tally.add(part)
        sum_undivided_gradients(self.model)
        return tally

    def _run(
        self,
        plan: Plan,
        micro: MicroStep,
        batch: Sequence[PackedSequence],
        objective: Callable[[LossSums], Tensor],
        last: bool,
        index_weight: float,
    ) -> Iterator[LossSums]:
        """Forward and backward of a micro-step, whole or span after span in time."""
        groups, shapes = self._in_time(plan, micro)
        self._share_scales(groups[0])
        if self.spans is None or len(groups) == 1:
            placed = self._place(groups[0], batch, shapes[0], step=plan.step, index_weight=index_weight)
            self._begin(last)
            for layers in (self.model.layers, self.model.mtp):
                recompute_group(layers, groups[0].recompute)  # type: ignore[arg-type]
            with self.phase("forward"):
                if self.teacher is None:
                    part = sums(self.model(placed.tokens, placed.seq, placed.targets, ahead=placed.ahead))
                else:  # which reads by itself: a sequence is used up by one pass
                    asked = self.teacher.objective(self._place(groups[0], batch, shapes[0], step=plan.step))
                    part = distilled(self.model(placed.tokens, placed.seq, placed.targets, objective=asked))
            with self.phase("backward"):
                self._backward(objective(part))
            yield part
            return
        tokens = [sum(end - begin for held in g.spans for begin, end in held) for g in groups]

        def forward(i: int, memory: Memory) -> LossSums:
            how: dict[str, Any] = {"memory": memory, "index_weight": index_weight}
            placed = self._place(groups[i], batch, shapes[i], step=plan.step, **how)
            return sums(self.model(placed.tokens, placed.seq, placed.targets, ahead=placed.ahead))

        def begin_backward(ends: bool) -> None:
            communicate_gradients(self.model, last and ends)

        yield from Passage(forward, tokens, objective, begin_backward, self.phase, self.passed).run(self.spans)

    def _share_scales(self, group: Group) -> None:
        """Has scales that span tokens be those of all ranks of the group, forward and backward."""
        if self.low is not None:
            comm = self.groups.comm(group.ranks)
            self.low.share = None if comm.size == 1 else partial(largest_of, comm)

    def _begin(self, last: bool) -> None:
        if self.engine is None:
            communicate_gradients(self.model, last)
        else:
            self.engine.begin(last)

    def _backward(self, loss: Tensor) -> None:
        if self.engine is None:
            loss.backward()
        else:
            self.engine.backward(loss)

    @torch.no_grad()
    def evaluate(self, plan: Plan, batch: Sequence[PackedSequence]) -> Tally:
        """Forward only."""
        tally = self._empty()
        for _, output in self._outputs(plan, batch):
            tally.add(sums(output))
        return tally

    def score(self, plan: Plan, batch: Sequence[PackedSequence]) -> tuple[Tensor, Tensor]:
        """Scores every token of the batch, end to end: the nats of its target, fp64, and whether that is the likeliest
        token; 0 and False without a target. The same on every rank."""

        def read(output: Output) -> list[Tensor]:
            assert output.nats is not None and output.right is not None
            return [output.nats, output.right]

        nats, right = self.by_token(plan, batch, read)
        return nats, right > 0

    @torch.no_grad()
    def by_token(self, plan: Plan, batch: Sequence[PackedSequence], read: Callable[[Output], list[Tensor]]) -> Tensor:
        """Returns what `read` takes of each micro-step, some values [B, T]: fp64 [values, N], of every token of the
        batch, end to end, the same on every rank. Forward only, and not in a pipeline."""
        assert self.pipeline is None
        begins = np.cumsum([0, *plan.lengths])
        losses: Tensor | None = None
        for group, output in self._outputs(plan, batch):
            values = torch.stack([x.flatten().double() for x in read(output)])
            if losses is None:
                losses = values.new_zeros(len(values), int(begins[-1]))
            held = group.spans[group.ranks.index(self.groups.rank)]
            if not held:
                continue
            places = np.concatenate([np.arange(begins[s], begins[s + 1]) for s in group.sequences])
            mine = torch.from_numpy(np.concatenate([places[begin:end] for begin, end in held])).to(self.device)
            losses[:, mine] = values
        assert losses is not None
        return self.groups.world_comm.all_reduce(losses, purpose="evaluation")

    def _outputs(self, plan: Plan, batch: Sequence[PackedSequence]) -> Iterator[tuple[Group, Output]]:
        """Returns what the model says of each micro-step, whole or span after span in time."""
        for _, micro in self._micro_steps(plan, batch):
            groups, shapes = self._in_time(plan, micro)
            self._share_scales(groups[0])
            memory = Memory() if len(groups) > 1 else None
            for group, shape in zip(groups, shapes, strict=True):
                placed = self._place(group, batch, shape, memory=memory if any(group.spans) else None)
                run = self.model if self.pipeline is None else self.pipeline.forward
                yield group, run(placed.tokens, placed.seq, placed.targets)
                if memory is not None:
                    memory.advance()

    def _in_time(self, plan: Plan, micro: MicroStep) -> tuple[list[Group], list[tuple[Shape, ...]]]:
        """This rank's group, whole or as spans in time: as many on every rank; and the shapes of all ranks in each."""
        count = 1 if self.spans is None else time_spans.count(micro, plan.lengths, self.spans.tokens)
        cut = [[g] if count == 1 else time_spans.in_time(g, plan.lengths, count) for g in micro.groups]
        own = micro.groups.index(micro.group_of(self.groups.rank))
        return cut[own], [time_spans.shapes(together) for together in zip(*cut, strict=True)]

    def _micro_steps(self, plan: Plan, batch: Sequence[PackedSequence]) -> Iterator[tuple[bool, MicroStep]]:
        """Each micro-step, and whether it is the last. Raises ValueError for a plan that fails or is another's."""
        with self.phase("plan"):
            plan.check(self.groups.world)
            if plan.lengths != (lengths := tuple(len(s.tokens) for s in batch)):
                raise ValueError(f"the plan is of sequences of {list(plan.lengths)} tokens, the batch's have {lengths}")
            self.groups.prepare(plan)
        for m, micro in enumerate(plan.micro_steps):
            yield m == len(plan.micro_steps) - 1, micro

    def _place(
        self,
        group: Group,
        batch: Sequence[PackedSequence],
        shapes: tuple[Shape, ...],
        step: int | None = None,
        memory: Memory | None = None,
        index_weight: float = 0.0,
    ) -> Placed:
        with self.phase("plan"):
            return place(
                group,
                batch,
                self.groups.comm(group.ranks),
                device=self.device,
                recurrence=self.recurrence,
                attention=self.attention,
                step=step,
                memory=memory,
                shapes=shapes,
                mtp=0 if step is None else self.mtp,
                index_weight=index_weight,
            )

    def _empty(self) -> Tally:
        nats, balance, z, divergence, index_loss, count = torch.zeros(6, device=self.device).unbind()
        load = {name: torch.zeros(size, dtype=torch.long, device=self.device) for name, size in self.experts.items()}
        dropped = dict.fromkeys(self.limited, count.long())
        ahead = torch.zeros(self.mtp, device=self.device)
        return Tally(nats, balance, load, z, dropped, count.long(), divergence, ahead, index_loss)
