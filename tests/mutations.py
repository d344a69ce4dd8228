"""Ways to break the mechanisms on purpose: name -> a function that breaks it in this process for good."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch

import models.conv
import models.recurrence
import models.token_subset
import parallel.collectives
import parallel.fsdp
import parallel.parallelize
import parallel.sequence.attention.all_gather
import parallel.sequence.attention.ring_ulysses
import parallel.sequence.attention.visibility
import parallel.sequence.attention.window_fetch
import parallel.sequence.nonlinear
import parallel.sequence.place
import parallel.sequence.span_layout
import parallel.sequence.spread
import parallel.sequence.states.all_gather
import parallel.sequence.states.relay
import train.execute
import train.loss
from models.kernels.chunking import Begun
from parallel.collectives import Comm
from parallel.sequence.spread import Spread
from parallel.sequence.states.p2p import Post


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
            self.begun, self.ahead, self.finish = begun, begun.ahead, begun.finish

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
    honest = parallel.sequence.attention.visibility.meetings

    def own(chain, asking, asked):
        return honest(chain, asking, asked) if asking == asked else iter(())

    parallel.sequence.attention.all_gather.meetings = parallel.sequence.attention.ring_ulysses.meetings = own


def forget_the_divide_factor() -> None:
    parallel.fsdp.sum_gradients = lambda model: None


def divide_by_local_targets() -> None:
    honest = train.loss.LossSums.objective
    train.loss.LossSums.objective = lambda self, targets, tokens, **weights: honest(
        self, targets=targets // 2, tokens=tokens, **weights
    )


def keep_gradients_of_other_ranks_spans() -> None:
    parallel.collectives.Comm.reduce_scatter = lambda self, x, purpose: x[self.rank].clone()


def count_experts_on_this_rank_only() -> None:
    Spread.sum = lambda self, x: self.local_sum(x)


def order_spans_by_rank() -> None:
    link = parallel.sequence.span_layout.Link
    parallel.sequence.span_layout.SpanLayout.links = property(
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


def let_padding_count() -> None:
    honest = train.execute.place

    def blind(group, batch, *rest, **options):
        names = ("tokens", "targets", "positions")
        every = [SimpleNamespace(counted=s.counted | True, **{n: getattr(s, n) for n in names}) for s in batch]
        return honest(group, every, *rest, **options)

    train.execute.place = blind


def hand_states_to_the_span_before() -> None:
    honest = parallel.sequence.spread.cross

    class Reversed(parallel.sequence.span_layout.SpanLayout):
        @property
        def links(self):
            return sorted(super().links, reverse=True)

    parallel.sequence.spread.cross = lambda transport, chain, *rest: honest(
        transport, Reversed(chain.comm, chain.spans, chain.starts), *rest
    )


def carry_gradients_back_without_the_transpose() -> None:
    """A·G where it should be Aᵀ·G; a diagonal A would not notice."""
    for transport in (parallel.sequence.states.all_gather, parallel.sequence.states.relay):

        def blind(recurrence, effect, state, grad, honest=transport.transpose):
            A, U, _ = honest(recurrence, effect, state, grad)
            return A, U, models.recurrence._each(effect.alive, grad) * recurrence.apply(effect.A, grad)

        transport.transpose = blind


def carry_states_in_bf16() -> None:
    send, gather = Post.send, Comm.all_gather
    Post.send = lambda self, n, x: send(self, n, x.bfloat16().to(x.dtype))
    Comm.all_gather = lambda self, x, purpose: gather(
        self, x.bfloat16().to(x.dtype) if purpose == "state" else x, purpose=purpose
    )


def lose_a_hop_of_the_keys_gradient() -> None:
    """What the later half of the ranks sends rank 0 of the gradients of its keys and values is lost."""
    receive, scatter, mine = Comm.start_receive, Comm.reduce_scatter, "keys and values gradient"

    class Lost(NamedTuple):
        work: torch.distributed.Work
        x: torch.Tensor

        def wait(self):
            self.work.wait()
            self.x.zero_()

    def start_receive(self, like, source, *, purpose):
        work, x = receive(self, like, source, purpose=purpose)
        return Lost(work, x) if purpose == mine and self.rank == 0 and source >= self.size / 2 else work, x

    def reduce_scatter(self, x, *, purpose):
        if purpose == mine and self.rank >= self.size / 2:
            x = torch.cat((torch.zeros_like(x[:1]), x[1:]))
        return scatter(self, x, purpose=purpose)

    Comm.start_receive, Comm.reduce_scatter = start_receive, reduce_scatter


def fetch_one_token_less_than_the_window() -> None:
    honest = parallel.sequence.attention.window_fetch.needed
    parallel.sequence.attention.window_fetch.needed = lambda chain, link, window, sinks: honest(
        chain, link, window - 1, sinks
    )


def fetch_no_sinks() -> None:
    honest = parallel.sequence.attention.window_fetch.needed
    parallel.sequence.attention.window_fetch.needed = lambda chain, link, window, sinks: honest(chain, link, window, 0)


def lose_the_state_of_an_idle_memory() -> None:
    models.recurrence.Dense.unchanged = lambda self, A: 0 * A


def forget_the_tail_of_a_memory() -> None:
    models.token_subset.Moved.finish = lambda self, state: (
        0 * (self.effect.U if state is None else state)[:, 0].to(self.dtype)
    )


def run_spans_from_nothing() -> None:
    """What is no affine map, as if no state had come from the rank before."""

    class Lost(Post):
        def receive(self, n, like):
            return 0 * super().receive(n, like)

    parallel.sequence.nonlinear.Post = Lost


def lose_what_latents_are_owed_as_values() -> None:
    """Their gradient as keys alone is sent back."""
    honest = parallel.sequence.attention.visibility.apart
    parallel.sequence.attention.visibility.apart = lambda kv, width: (
        honest(kv, width)[0],
        honest(kv, width)[1].clone(),
    )


def select_no_key_of_an_earlier_span() -> None:
    honest = parallel.sequence.spread.causal

    def own(positions, offset):
        first, last = honest(positions, offset)
        return first.clamp_min(offset), last

    parallel.sequence.spread.causal = own


def lose_the_index_of_an_earlier_span() -> None:
    """Its gradient does not come back with those of keys and values."""
    honest = parallel.sequence.spread.packed
    parallel.sequence.spread.packed = lambda k, v, index_k: honest(k, v, index_k.detach() + 0 * index_k)


def let_no_sink_take_its_share() -> None:
    parallel.sequence.attention.visibility.join_sink = lambda out, lse, sink: None


def forget_the_cap_of_scores() -> None:
    honest = parallel.sequence.attention.ring_ulysses.tile_for
    for transport in (parallel.sequence.attention.ring_ulysses, parallel.sequence.attention.all_gather):
        transport.tile_for = lambda device, softcap=None: honest(device)


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
        let_padding_count,
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


class Broken(NamedTuple):
    """What is broken on the way between ranks, and the rows of the matrix that turn red, whatever the transport."""

    by: Callable[[], None]
    mixers: tuple[str, ...]
    precision: str = "fp64"
    layout: str = "contiguous"
    packing: str = "one document"


MHA, GROUPED, WINDOW = "attention", "attention, two key heads", "attention, window"
CAPPED = "attention, capped"
CARRIED: dict[str, Broken] = {
    broken.by.__name__: broken
    for broken in (
        Broken(drop_the_terminal_term_of_the_gates_gradient, ("gla", "gated_deltanet", "lru", "mamba3", "mlstm")),
        Broken(take_the_diagonal_of_a_dense_transition, ("gated_deltanet", "gated_deltanet2", "kda")),
        Broken(
            keep_the_state_across_a_document_start_between_spans, ("gla", "rglru", "mlstm"), packing="starts one after"
        ),
        Broken(order_spans_by_rank, ("gla", "gated_deltanet"), layout="zigzag"),
        Broken(hand_states_to_the_span_before, ("linear", "gla", "gated_deltanet")),
        Broken(carry_gradients_back_without_the_transpose, ("deltanet", "gated_deltanet")),
        Broken(carry_states_in_bf16, ("gla", "gated_deltanet"), precision="fp32"),
        Broken(lose_the_state_of_an_idle_memory, ("mom",), layout="unequal"),
        Broken(forget_the_tail_of_a_memory, ("mom",)),
        Broken(run_spans_from_nothing, ("lact", "slstm")),
        Broken(lose_a_hop_of_the_keys_gradient, (MHA, GROUPED, WINDOW)),
        Broken(fetch_one_token_less_than_the_window, (WINDOW,)),
        Broken(fetch_no_sinks, (WINDOW,)),
        Broken(lose_what_latents_are_owed_as_values, ("mla",)),
        Broken(select_no_key_of_an_earlier_span, ("dsa",)),
        Broken(lose_the_index_of_an_earlier_span, ("dsa",)),
        Broken(let_no_sink_take_its_share, (CAPPED,)),
        Broken(forget_the_cap_of_scores, (CAPPED,)),
    )
}
