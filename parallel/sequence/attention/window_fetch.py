"""Windows: a span needs no more keys than reach into its first token's window, and the first few of that document."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.kernels.packed_attention import attend_pieces
from models.kernels.pieces import Piece
from parallel.collectives import as_operator
from parallel.sequence.attention.few_bits import EXACT, KeyCodec
from parallel.sequence.span_layout import Link, SpanLayout

Range = tuple[int, int]  # tokens [begin, end) of the packed sequence


def needed(chain: SpanLayout, link: Link, window: int, sinks: int) -> list[Range]:
    """Ranges of tokens before the span `link` that it sees, ascending: its document's sinks, and a window's past."""
    first, begin, _ = chain.documents_of(link)[0]
    if first == begin:
        return []
    near = max(first, begin - window + 1)
    ranges = [(first, min(first + sinks, near)), (near, begin)]
    return [(a, b) for a, b in ranges if a < b]


def attend_in_window(
    chain: SpanLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: list[list[Piece]],
    *,
    window: int,
    sinks: int,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    codec: KeyCodec = EXACT,
) -> Tensor:
    """Implements `Keys.attend` for a layer with a window, on any layout: every span fetches the tokens that it sees, no
    more. codec: of messages, whose format k and v are rounded to already."""
    wanted = [needed(chain, chain.links[n], window, sinks) for n in chain.mine]
    past = _Fetch.apply(chain, window, sinks, codec, (k.shape[-1], v.shape[-1]), torch.cat((k, v), dim=-1))
    counts = [sum(b - a for a, b in ranges) for ranges in wanted]
    longest = max(counts)
    rows = []
    for span, count in zip(past.split(counts), counts, strict=True):  # the span's own tokens line up behind its past
        rows.append(torch.cat((span.new_zeros(longest - count, *span.shape[1:]), span)))
    keys, values = (
        torch.cat((before, own), dim=1)
        for before, own in zip(torch.stack(rows).split((k.shape[-1], v.shape[-1]), dim=-1), (k, v), strict=True)
    )
    firsts = [longest - count for count in counts]
    return attend_pieces(
        q,
        keys,
        values,
        pieces,
        [longest] * len(counts),
        window=window,
        sinks=sinks,
        firsts=firsts,
        softcap=softcap,
        sink_logits=sink_logits,
    )


def _parts(chain: SpanLayout, ranges: list[Range]) -> list[tuple[Link, slice]]:
    """Ranges cut by the spans that hold them."""
    return [
        (link, slice(max(a, link.begin) - link.begin, min(b, link.end) - link.begin))
        for a, b in ranges
        for link in chain.links
        if link.begin < b and a < link.end
    ]


def _fetched(
    chain: SpanLayout, orders: dict[int, list[tuple[Link, slice]]], codec: KeyCodec, widths: tuple[int, int], x: Tensor
) -> list[Tensor]:
    """Sends what each rank ordered of x, and gives what this one did."""
    me = chain.comm.rank
    sent = []
    for rank, parts in orders.items():
        mine = [x[link.row, at] for link, at in parts if link.rank == me]
        if mine and rank != me:
            out = codec.packed(torch.cat(mine), widths)
            sent.append((chain.comm.send(out, rank, purpose="keys and values"), out))
    arrived = {}
    for source in sorted({link.rank for link, _ in orders[me]} - {me}):
        count = sum(at.stop - at.start for link, at in orders[me] if link.rank == source)
        like = codec.like(x, (count, *x.shape[2:-1]), widths)
        message = chain.comm.receive(like, source, purpose="keys and values")
        arrived[source] = codec.unpacked(message, widths, x.dtype)
    pieces, counts = [], dict.fromkeys(arrived, 0)
    for link, at in orders[me]:
        if link.rank == me:
            pieces.append(x[link.row, at])
            continue
        begin = counts[link.rank]
        counts[link.rank] += at.stop - at.start
        pieces.append(arrived[link.rank][begin : counts[link.rank]])
    for work, _ in sent:
        work.wait()
    return [torch.cat(pieces) if pieces else x.new_empty(0, *x.shape[2:])]


class _Fetch(torch.autograd.Function):
    """x [B, T, ...] -> the tokens that this rank's spans ask for, [N, ...], row after row."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: SpanLayout,
        window: int,
        sinks: int,
        codec: KeyCodec,
        widths: tuple[int, int],
        x: Tensor,
    ) -> Tensor:
        orders = {
            rank: [
                part
                for link in chain.links
                if link.rank == rank
                for part in _parts(chain, needed(chain, link, window, sinks))
            ]
            for rank in range(chain.comm.size)
        }
        ctx.chain, ctx.orders, ctx.shape = chain, orders, x.shape
        return as_operator(partial(_fetched, chain, orders, codec, widths), x)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        chain, orders, me = ctx.chain, ctx.orders, ctx.chain.comm.rank
        total = grad.new_zeros(ctx.shape)
        by_source: dict[int, list[Tensor]] = {}
        for (link, at), part in zip(orders[me], grad.split([at.stop - at.start for _, at in orders[me]]), strict=True):
            if link.rank == me:
                total[link.row, at] += part
            else:
                by_source.setdefault(link.rank, []).append(part)
        sent = []
        for source, parts in sorted(by_source.items()):
            out = torch.cat(parts)
            sent.append((chain.comm.send(out, source, purpose="keys and values gradient"), out))
        for rank, parts in orders.items():
            mine = [(link, at) for link, at in parts if link.rank == me]
            if rank == me or not mine:
                continue
            sizes = [at.stop - at.start for _, at in mine]
            arrived = chain.comm.receive(
                grad.new_empty(sum(sizes), *grad.shape[1:]), rank, purpose="keys and values gradient"
            )
            for (link, at), part in zip(mine, arrived.split(sizes), strict=True):
                total[link.row, at] += part
        for work, _ in sent:
            work.wait()
        return None, None, None, None, None, total
