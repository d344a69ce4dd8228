"""One crossing of a chain of spans: effects in, entering states out, and the exact transpose of that.

A transport is two plain functions of tensors. `states` brings to each span the state that enters it; `gradients` brings
to each span the gradient of the state that leaves it, from those of the states that enter spans: the same chain, walked
backwards, with A transposed. What is left is local, and the same for every transport: the gradient of `act`.

Two ranks, one span each, effects (A0, U0) and (A1, U1). Forward, `states` gives rank 0 the entering state 0 and rank 1
the state S1 = A0·0 + U0 = U0. The state that leaves rank 1, A1·S1 + U1, enters nothing. Backward, rank 1 knows G1 =
∂loss/∂S1 from its own outputs. `gradients` gives each span the gradient of the state that *leaves* it: rank 0 gets G1,
rank 1 gets 0. Then each rank finishes alone (`transpose`): rank 0 has ∂U0 = G1 and ∂A0 = G1·0ᵀ = 0, rank 1 has zeros.
With a third rank, G2 = ∂loss/∂S2 must pass rank 1 on its way: the gradient of the state that leaves rank 0 is G1 +
A1ᵀ·G2. A relay sends exactly that from rank to rank; an all-gather sends every G to all, and each rank folds.

Both ranks call everything: rank 0 needs no state and rank 1 no gradient, but a collective that one rank skips never
returns on the other. That is why autograd may not prune the crossing: `_Depart` returns a scalar zero that
`_Arrive` takes, so both run backward on every rank, and zeros count as gradients.

Both run beside the main thread, between `depart` and `arrive`: what is computed between the two hides the way. In the
backward pass autograd runs the same nodes in the opposite order, so that the gradient is on its way while what was
computed between is differentiated. Both are operators, which a checkpointing policy may keep: computing a layer again
then sends nothing.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from models.kernels.chunking import Effect
from models.recurrence import Recurrence
from parallel.collectives import as_operator
from parallel.sequence.span_layout import SpanLayout


class Transport(Protocol):
    """A way to send states along a chain. Rows are this rank's spans; it needs no autograd."""

    def states(self, chain: SpanLayout, recurrence: Recurrence, effect: Effect) -> tuple[Tensor, list[Tensor]]:
        """The states [B, ...] that enter this rank's spans, and what `gradients` will want to see again."""
        ...

    def gradients(
        self,
        chain: SpanLayout,
        recurrence: Recurrence,
        effect: Effect,
        entering: Tensor,
        saved: list[Tensor],
        grad: Tensor,
    ) -> Tensor:
        """Returns the gradients [B, ...] of the states that leave this rank's spans, from those of the entering
        states."""
        ...


class Crossing:
    """A crossing on its way. One thread a process takes them, in the order of their departure, as every rank does."""

    _thread = ThreadPoolExecutor(1, thread_name_prefix="crossing")

    def __init__(self, transport: Transport, chain: SpanLayout, recurrence: Recurrence):
        self.transport, self.chain, self.recurrence = transport, chain, recurrence
        self._coming: Future[Any] | None = None
        self.local: Callable[[], tuple[Tensor, Tensor]] | None = None  # the gradients of A and U, once they arrive

    def depart(self, way: Callable[..., Any], *args: Any) -> None:
        self._coming = self._thread.submit(torch.no_grad()(way), self.chain, self.recurrence, *args)

    def arrive(self) -> Any:
        assert self._coming is not None
        coming, self._coming = self._coming, None
        with self.chain.comm.waiting():
            return coming.result()


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: Crossing, A: Tensor, U: Tensor, alive: Tensor) -> Tensor:
        ctx.crossing = crossing

        def depart(*effect: Tensor) -> list[Tensor]:
            crossing.depart(crossing.transport.states, Effect(*effect))
            return [U.new_zeros(())]  # only a thread for autograd to follow

        return as_operator(depart, A, U, alive)[0]

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        local, ctx.crossing.local = ctx.crossing.local, None
        return None, *local(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: Crossing, departed: Tensor, A: Tensor, U: Tensor, alive: Tensor) -> Tensor:
        def arrive(_: Tensor) -> list[Tensor]:
            entering, saved = crossing.arrive()
            return [entering, *saved]

        entering, *saved = as_operator(arrive, departed)
        ctx.crossing = crossing
        ctx.save_for_backward(A, U, alive, entering, *saved)
        return entering

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        A, U, alive, entering, *saved = ctx.saved_tensors
        crossing: Crossing = ctx.crossing
        effect = Effect(A.detach(), U.detach(), alive)
        entering = entering.detach()  # else it holds this node, which holds the crossing: a circle that is never freed
        crossing.depart(crossing.transport.gradients, effect, entering, saved, grad)

        def local() -> tuple[Tensor, Tensor]:
            return transpose(crossing.recurrence, effect, entering, crossing.arrive())[:2]

        crossing.local = local
        return None, grad.new_zeros(()), None, None, None


def transpose(recurrence: Recurrence, effect: Effect, state: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A, U and the incoming `state` from that of the outgoing one: for linear kinds G·Sᵀ, G, Aᵀ·G."""
    with torch.enable_grad():
        A, U, state = (x.detach().requires_grad_() for x in (effect.A, effect.U, state))
        out = recurrence.act(Effect(A, U, effect.alive), state)
    return torch.autograd.grad(out, (A, U, state), grad, materialize_grads=True)  # type: ignore[return-value]


def row(effect: Effect, i: int) -> Effect:
    """One span's."""
    return Effect(*(part[i : i + 1] for part in effect))


def cross(transport: Transport, chain: SpanLayout, recurrence: Recurrence, effect: Effect) -> Callable[[], Tensor]:
    """Starts a crossing. What it returns waits for it, and gives the states that enter this rank's spans."""
    crossing = Crossing(transport, chain, recurrence)
    departed = _Depart.apply(crossing, *effect)
    return lambda: _Arrive.apply(crossing, departed, *effect)
