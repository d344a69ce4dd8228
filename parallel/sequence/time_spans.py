"""Spans in time of a sequence that is spread over ranks: what the chain of one leaves to the chain of the next.

What is left, states, tails, keys and values, lies on every rank alike, as copies. Whoever uses a copy gives it a part
of the gradient, and the parts of all ranks make up the whole: an all-gather brings the copies, and its transpose sums
their gradients. A rank's chain then needs no more than its first span entered with a state.

Legend: B spans of this rank, T tokens, G key/value heads, W widths of a key and a value together, S the chain's tokens.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.chunking import Effect
from models.kernels.packed_attention import attend_pieces
from models.kernels.pieces import Piece
from models.kv_cache import KVCache
from models.recurrence import Recurrence
from parallel.collectives import gather
from parallel.sequence.span_layout import Chained, Link, SpanLayout
from parallel.sequence.states import Transport, cross
from parallel.sequence.states.transport import row


class SpreadInTime(Chained, Protocol):
    """States how much of a `Spread` the functions here use: its chain, its transport of states, its runs and halos."""

    recurrence: Transport

    @property
    def pieces(self) -> list[list[Piece]]: ...

    def halos(self, x: Tensor, width: int, *, slot: str) -> Tensor: ...


def with_past(seq: SpreadInTime, halos: Tensor, *, slot: str) -> Tensor:
    """The inputs [B, width, ...] before this rank's spans, from those of the chain alone: `halos` [B + 1, width, ...],
    zeros before its begin, and last those before its end."""
    halos = _behind(seq, halos, seq.recall(slot))
    seq.leave(slot, lambda: halos[-1:])
    return halos[:-1]


def _behind(seq: SpreadInTime, halos: Tensor, past: Tensor | None) -> Tensor:
    """`halos` with `past` [1, width, ...], the inputs before the chain, where they reach there."""
    chain, width = seq.chain, halos.shape[1]
    if past is not None:
        begins = [*(chain.links[n].begin for n in chain.mine), chain.links[-1].end]
        missing = [max(0, width - (begin - chain.links[0].begin)) for begin in begins]
        rest = [F.pad(past[0, width - m :], [0, 0] * (past.dim() - 2) + [0, width - m]) for m in missing]
        halos = halos + torch.stack(rest)
    return halos


def entering(seq: SpreadInTime, recurrence: Recurrence, effect: Effect, *, slot: str) -> Tensor:
    """The states that enter this rank's spans, those that entered the chain among them."""
    chain, state = seq.chain.of(slot), seq.recall(slot)
    first, last = chain.links[0], chain.links[-1]
    ours = state is not None and first.rank == chain.comm.rank
    if ours:
        effect = effect._replace(U=_placed(effect.U, first.row, recurrence.act(row(effect, first.row), state)))
    states: Tensor = cross(seq.recurrence, chain, recurrence, effect)()

    def leaving() -> Tensor:
        held = last.row if last.rank == chain.comm.rank else 0
        out = recurrence.act(row(effect, held), states[held : held + 1])
        return gather(chain.comm, out, lambda outs: outs[last.rank], purpose="state in time", linear=True)

    seq.leave(slot, leaving)
    if ours:  # added and not put in place: every rank has to differentiate the crossing
        states = _placed(states, first.row, recurrence.add(states[first.row : first.row + 1], state))
    return states


def _placed(x: Tensor, at: int, one: Tensor) -> Tensor:
    return torch.cat((x[:at], one, x[at + 1 :]))


def attend(
    seq: SpreadInTime,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slot: str,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    values_in_keys: bool = False,
) -> Tensor:
    """Implements `Sequence.attend`. Within a window, the keys and values before a span are inputs like any other; else
    the chain's are gathered, and join those that it was entered with."""
    values_in_keys = values_in_keys and window is None
    kv_BTGW = k if values_in_keys else torch.cat((k, v), dim=-1)
    widths = (k.shape[-1], v.shape[-1])
    softmax: dict[str, Any] = {"softcap": softcap, "sink_logits": sink_logits}
    if window is not None and not sinks:
        past_BTGW = _window(seq, kv_BTGW, widths, window - 1, slot)
        keys, values = torch.cat((past_BTGW, kv_BTGW), dim=1).split(widths, dim=-1)
        return attend_pieces(q, keys, values, seq.pieces, [window - 1] * len(q), window=window, **softmax)
    chain = seq.chain.of(slot)
    if len(chain.mine) != 1:
        raise ValueError("spans in time: a rank holds one span of each chain")

    def joined(gathered: Tensor) -> Tensor:
        return torch.cat([gathered[a.rank, a.row, : a.length] for a in chain.links])[None]

    padded = F.pad(kv_BTGW, [0, 0, 0, 0, 0, chain.longest - k.shape[1]])
    everyone = gather(chain.comm, padded, joined, purpose="keys and values", linear=True)
    all_k, all_v = (everyone, everyone[..., : widths[1]]) if values_in_keys else everyone.split(widths, dim=-1)
    past = seq.recall(slot) or KVCache(k[:, :0], v[:, :0])
    runs = pieces(chain)
    firsts, held = past.firsts([runs]), past.joined(all_k, all_v)
    seq.leave(slot, lambda: held.kept([runs], firsts, window, sinks))
    at = chain.links[chain.mine[0]].begin - chain.links[0].begin
    offset, before = past.k.shape[1] + at, seq.pieces[0][0].past
    if firsts is not None and before <= at:  # the document began in this chain
        firsts = [offset - before]
    return attend_pieces(q, held.k, held.v, seq.pieces, [offset], window=window, sinks=sinks, firsts=firsts, **softmax)


def _window(seq: SpreadInTime, kv_BTGW: Tensor, widths: tuple[int, int], width: int, slot: str) -> Tensor:
    """The keys and values [B, width, G, W] before this rank's spans; leaves those before the end, as `Whole` does."""
    held: KVCache | None = seq.recall(slot)
    past = None
    if held is not None:
        past = F.pad(torch.cat((held.k, held.v), dim=-1), [0, 0, 0, 0, width - held.k.shape[1], 0])
    halos = _behind(seq, seq.halos(kv_BTGW, width, slot=slot), past)
    there = width - min(width, seq.chain.links[-1].end)  # places before the sequence's own begin
    seq.leave(slot, lambda: KVCache(*halos[-1:, there:].split(widths, dim=-1)))
    return halos[:-1]


def pieces(chain: SpanLayout) -> list[Piece]:
    """The runs of the whole chain, as if it were one span."""
    begin, end = chain.links[0].begin, chain.links[-1].end
    return [Piece(a - begin, b - begin, a - first) for first, a, b in chain.documents_of(Link(begin, end, 0, 0))]
