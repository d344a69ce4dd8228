"""Recurrences that are no affine map, over ranks: each span is run when the state that enters it has come, and hands on
the one that leaves it. Backward the gradient of the state goes from the last span to the first.

A span is run again in its backward pass, so that only the state that entered it is kept. The way is one operator, which
a checkpointing policy may keep: computing a layer again then sends nothing. Messages of one layer are over before the
next one's begin, on every rank, in the order of the chain.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels.pieces import know, pieces_of
from models.nonlinear_recurrence import Serial
from parallel.collectives import as_operator, gather
from parallel.sequence.span_layout import Chained, SpanLayout
from parallel.sequence.states.p2p import Post


class Course(NamedTuple):
    """A recurrence along a chain; `xs` of its tensors are by token, the others shared."""

    chain: SpanLayout
    recurrence: Serial
    positions: Tensor  # [B, T]
    xs: int

    def span(self, i: int, state: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """This rank's i-th span, entered with `state` [1, ...]."""
        xs = tuple(x[i : i + 1] for x in tensors[: self.xs])
        positions = know(self.positions[i : i + 1], pieces_of(self.positions)[i : i + 1])
        return self.recurrence.run(xs, tensors[self.xs :], positions, state)


class _Passed(torch.autograd.Function):
    """Outputs [B, T, ...] of this rank's spans and the states [B, ...] that leave them; `state` [1, ...] enters the
    chain."""

    @staticmethod
    def forward(ctx: Any, course: Course, state: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        def way(state: Tensor, *tensors: Tensor) -> list[Tensor]:
            outs, entering, leaving = [], [], dict[int, Tensor]()
            with Post(course.chain, "state") as post:
                for i, n in enumerate(course.chain.mine):
                    if n == 0:
                        entering.append(state)
                    elif n - 1 in leaving:
                        entering.append(leaving[n - 1])
                    else:
                        entering.append(post.receive(n - 1, state))
                    out, leaving[n] = course.span(i, entering[-1], tensors)
                    post.send(n + 1, leaving[n])
                    outs.append(out)
            return [torch.cat(outs), torch.cat([leaving[n] for n in course.chain.mine]), torch.cat(entering)]

        outs, left, entering = as_operator(way, state, *tensors)
        ctx.course = course
        ctx.save_for_backward(entering, *tensors)
        return outs, left

    @staticmethod
    def backward(ctx: Any, d_outs: Tensor, d_left: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        entering, *tensors = ctx.saved_tensors
        course: Course = ctx.course
        chain = course.chain
        gradients = [torch.zeros_like(x) for x in tensors]
        arriving: dict[int, Tensor] = {}
        with Post(chain, "state gradient") as post:
            for i, n in reversed(list(enumerate(chain.mine))):
                after = d_left[i : i + 1]
                if n + 1 in arriving:
                    after = after + arriving[n + 1]
                elif n + 1 < len(chain.links):
                    after = after + post.receive(n + 1, after)
                leaves = [x.detach().requires_grad_() for x in (entering[i : i + 1], *tensors)]
                with torch.enable_grad():
                    ran = course.span(i, leaves[0], tuple(leaves[1:]))
                arriving[n], *parts = torch.autograd.grad(
                    ran, leaves, (d_outs[i : i + 1], after), materialize_grads=True
                )
                post.send(n - 1, arriving[n])
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient += part
        return None, arriving.get(0, torch.zeros_like(d_left[:1])), *gradients


def passed(seq: Chained, recurrence: Serial, *xs: Tensor, slot: str) -> Tensor:
    """The outputs of this rank's spans. Between spans in time, what leaves the chain lies on every rank alike."""
    chain, state = seq.chain.of(slot), seq.recall(slot)
    if state is None:
        state = recurrence.nothing(*(x[:1] for x in xs))
    outs, left = _Passed.apply(Course(chain, recurrence, seq.positions, len(xs)), state, *xs, *recurrence.shared)  # type: ignore[no-untyped-call]
    last = chain.links[-1]

    def leaving() -> Tensor:
        held = last.row if last.rank == chain.comm.rank else 0
        return gather(
            chain.comm,
            left[held : held + 1],
            lambda all_left: all_left[last.rank],
            purpose="state in time",
            linear=True,
        )

    seq.leave(slot, leaving)
    return outs
