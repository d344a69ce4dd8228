"""Ways to break the mechanisms on purpose: name -> a function that breaks it in this process for good."""

from collections.abc import Callable

import torch

import models.conv
import models.kernels.softmax
import models.recurrence
import parallel.apply
import parallel.collectives
import parallel.data
import parallel.sequence.chain
import parallel.sequence.place
import train.execute
import train.loss
from models.kernels.chunk import Begun
from parallel.sequence.spread import Spread


def drop_the_halo() -> None:
    Spread.before = lambda self, x, width, slot: torch.zeros_like(x[:, :1]).expand(-1, width, -1) + 0 * x.sum()


def skip_the_transition_in_the_prefix() -> None:
    for kind in (models.recurrence.Diagonal, models.recurrence.Dense):
        kind.apply = lambda self, A, state: state + 0 * A.sum()


def keep_the_state_across_a_document_start_between_spans() -> None:
    models.recurrence._each = lambda alive, state: torch.ones_like(alive).view(-1, *(1,) * (state.dim() - 1))


def ignore_document_starts_in_the_scan() -> None:
    honest = models.recurrence.Recurrence.begin
    models.recurrence.Recurrence.begin = lambda self, *xs, starts: honest(self, *xs, starts=torch.zeros_like(starts))


def take_the_diagonal_of_a_dense_transition() -> None:
    models.recurrence.Dense.apply = lambda self, A, state: A.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * state


def multiply_transitions_in_reverse() -> None:
    models.recurrence.Dense.multiply = lambda self, then, first: first @ then


def drop_the_terminal_term_of_the_gates_gradient() -> None:
    """The part that reaches a gate through what its span does to the state that entered."""
    honest = models.recurrence.Recurrence.begin

    class Constant:
        def __init__(self, begun: Begun):
            self.begun, self.finish = begun, begun.finish

        @property
        def effect(self):
            return self.begun.effect._replace(A=self.begun.effect.A.detach())

    models.recurrence.Recurrence.begin = lambda self, *xs, starts: Constant(honest(self, *xs, starts=starts))


def convolve_across_document_starts() -> None:
    honest = models.conv.ShortConv.forward

    def blind(self, x, seq, slot):
        positions, seq.positions = seq.positions, seq.positions + 10
        y = honest(self, x, seq, slot=slot)
        seq.positions = positions
        return y

    models.conv.ShortConv.forward = blind


def attend_to_no_key_of_an_earlier_span() -> None:
    honest = models.kernels.softmax.parts_of
    models.kernels.softmax.parts_of = lambda *args, **kwargs: (p for p in honest(*args, **kwargs) if not p.merged)


def forget_the_divide_factor() -> None:
    parallel.data.sum_gradients = lambda model: None


def divide_by_local_targets() -> None:
    honest = train.loss.Sums.objective
    train.loss.Sums.objective = lambda self, targets, tokens, **weights: honest(
        self, targets=targets // 2, tokens=tokens, **weights
    )


def keep_gradients_of_other_ranks_spans() -> None:
    parallel.collectives.Comm.reduce_scatter = lambda self, x, purpose: x[self.rank].clone()


def count_experts_on_this_rank_only() -> None:
    Spread.sum = lambda self, x: self.local_sum(x)


def order_spans_by_rank() -> None:
    link = parallel.sequence.chain.Link
    parallel.sequence.chain.Chain.links = property(
        lambda self: [link(b, e, r, i) for r, held in enumerate(self.spans) for i, (b, e) in enumerate(held)]
    )


def reduce_every_micro_step_and_keep_the_last() -> None:
    def forget(model, last):
        for p in model.parameters():
            p.grad = None

    train.execute.communicate_gradients = forget


def let_masked_tokens_count() -> None:
    for name in ("Whole", "Spread"):
        honest = getattr(parallel.sequence.place, name)

        def blind(*, counted, honest=honest, **rest):
            return honest(counted=torch.ones_like(counted), **rest)

        setattr(parallel.sequence.place, name, blind)


MUTATIONS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        drop_the_halo,
        skip_the_transition_in_the_prefix,
        keep_the_state_across_a_document_start_between_spans,
        ignore_document_starts_in_the_scan,
        take_the_diagonal_of_a_dense_transition,
        drop_the_terminal_term_of_the_gates_gradient,
        convolve_across_document_starts,
        attend_to_no_key_of_an_earlier_span,
        forget_the_divide_factor,
        divide_by_local_targets,
        keep_gradients_of_other_ranks_spans,
        count_experts_on_this_rank_only,
        order_spans_by_rank,
        reduce_every_micro_step_and_keep_the_last,
        let_masked_tokens_count,
    )
}

# What the tests of one process must catch by themselves: no transport of effects composes them before it acts.
ALGEBRA: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        skip_the_transition_in_the_prefix,
        keep_the_state_across_a_document_start_between_spans,
        ignore_document_starts_in_the_scan,
        take_the_diagonal_of_a_dense_transition,
        multiply_transitions_in_reverse,
        drop_the_terminal_term_of_the_gates_gradient,
    )
}
