"""Heads over some ranks, keys around a ring of the others: USP (Fang & Zhao 2024, 2405.07719), and its two ends.

The ranks of a group form a mesh of rows and columns. The ranks of a row exchange their spans for heads
(DeepSpeed-Ulysses, 2309.14509): each then has all tokens of the row, for its share of the heads. Keys and values of a
row travel down the columns, a hop at a time, the next one in flight while this one is seen (ring attention,
2310.01889); in the backward pass their gradients travel with them. With one column it is ring attention, with one row
it is Ulysses.

A block of keys is met by its spans, so every layout is served: two spans a rank balance causal work (zigzag), lengths
may differ, documents start anywhere. Where there are fewer key/value heads than columns, columns share a copy of one.

A rank writes the message of its keys and values once. In 8 bits, every hop passes on the bytes that arrived: they are
read there, and never rounded again.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.attention_tiles import Tile, sink_gradient, tile_for
from models.kernels.pieces import Piece
from parallel.collectives import as_operator
from parallel.schedule.comm_volume import KeyFormatName
from parallel.sequence.attention.few_bits import KeyCodec
from parallel.sequence.attention.visibility import Encounter, Encounters, Softmax, Transpose, meetings, together
from parallel.sequence.attention.window_fetch import attend_in_window
from parallel.sequence.span_layout import Link, SpanLayout

Arrival = Callable[[], list[Tensor]]


class MeshKeys:
    """`usp`: heads over as many ranks as their number allows, a ring over the rest.

    keys: the format of keys and values. Raises ValueError for one that there is not.
    """

    def __init__(self, keys: KeyFormatName = "exact"):
        self.codec = KeyCodec(keys)

    def split(self, ranks: int, heads: int, kv_heads: int) -> int:
        """Over how many ranks heads are split. Raises ValueError where they cannot be as asked."""
        return max(n for n in range(1, ranks + 1) if ranks % n == 0 and divides(n, heads, kv_heads))

    def attend(
        self,
        chain: SpanLayout,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pieces: list[list[Piece]],
        *,
        window: int | None = None,
        sinks: int = 0,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        values_in_keys: bool = False,
    ) -> Tensor:
        """See `Keys.attend`."""
        k = self.codec.rounded(k)
        v = k[..., : v.shape[-1]] if values_in_keys else self.codec.rounded(v)
        if window is not None:
            how: dict[str, Any] = {"window": window, "sinks": sinks, "softcap": softcap, "sink_logits": sink_logits}
            how["codec"] = self.codec
            return attend_in_window(chain, q, k, v, pieces, **how)
        mesh = RowsAndColumns(chain, self.split(chain.comm.size, q.shape[2], k.shape[2]))
        q, kv, scale = together(q, k, v, values_in_keys)
        out: Tensor = _Attended.apply(mesh, self.codec, tile_for(q.device, softcap), scale, sink_logits, q, kv)
        return out[..., : v.shape[-1]]


class Ring(MeshKeys):
    """`ring`: any number of heads; every key passes every rank."""

    def split(self, ranks: int, heads: int, kv_heads: int) -> int:
        return 1


class Ulysses(MeshKeys):
    """`ulysses`: two exchanges, and no more bytes the more ranks there are; needs a head for every rank."""

    def split(self, ranks: int, heads: int, kv_heads: int) -> int:
        if not divides(ranks, heads, kv_heads):
            raise ValueError(
                f"parallel.transport.attention=ulysses: {ranks} ranks cannot share heads={heads}, kv_heads={kv_heads}; "
                "gather, ring and usp can"
            )
        return ranks


def divides(split: int, heads: int, kv_heads: int) -> bool:
    """True where query heads can be split so, and key/value heads too, or several ranks can share each of them."""
    return heads % split == 0 and (kv_heads % split == 0 or split % kv_heads == 0)


class RowsAndColumns:
    """The ranks of a chain as rows that split heads and columns that are rings, `links[row]` a row's spans."""

    def __init__(self, chain: SpanLayout, split: int):
        self.chain, self.comm, self.split = chain, chain.comm, split
        self.row, self.column = divmod(chain.comm.rank, split)
        self.rows = chain.comm.size // split
        held = {(link.rank, link.row): link for link in chain.links}
        self.links: list[list[Link | None]] = [
            [held.get((row * split + u, i)) for u in range(split) for i in range(chain.rows)]
            for row in range(self.rows)
        ]

    @cached_property
    def encounters(self) -> list[Encounters]:
        """By hop: this row's spans with those of the row whose block is there."""
        return [
            Encounters(
                Encounter(a, (b,), meeting)
                for a, asking in enumerate(self.links[self.row])
                for b, asked in enumerate(self.links[self.row - hop])
                if asking is not None and asked is not None
                for meeting in meetings(self.chain, asking, asked)
            )
            for hop in range(self.rows)
        ]

    def heads(self, total: int) -> slice:
        """The heads of this column."""
        share = total // self.split
        return slice(self.column * share, (self.column + 1) * share)

    def by_heads(self, x_BTHK: Tensor, purpose: str) -> Tensor:
        """[B, T, H, K] of this rank -> [spans of the row, longest, H / split, K], heads of this column."""
        B, T, H = x_BTHK.shape[:3]
        x = F.pad(x_BTHK, [0, 0, 0, 0, 0, self.chain.longest - T, 0, self.chain.rows - B])
        if self.split == 1:
            return x
        if H < self.split:
            x = x.repeat_interleave(self.split // H, dim=2)
        parts = x.unflatten(2, (self.split, -1)).movedim(2, 0)
        return self._exchange(parts, purpose).flatten(0, 1)

    def by_spans(self, x_RTHK: Tensor, B: int, T: int, H: int, purpose: str) -> Tensor:
        """The way back; heads that were shared out as copies are summed."""
        if self.split == 1:
            return x_RTHK[:B, :T]
        parts = self._exchange(x_RTHK.unflatten(0, (self.split, -1)), purpose)
        x = parts.movedim(0, 2).flatten(2, 3)[:B, :T]
        return x.unflatten(2, (H, -1)).sum(3) if H < x.shape[2] else x

    def _exchange(self, parts: Tensor, purpose: str) -> Tensor:
        """[split, ...] for the ranks of this row -> [split, ...] from them."""
        first = self.row * self.split
        parts = parts.contiguous()
        sent = [self.comm.send(parts[u], first + u, purpose=purpose) for u in range(self.split) if u != self.column]
        received = [
            parts[u] if u == self.column else self.comm.receive(parts[u], first + u, purpose=purpose)
            for u in range(self.split)
        ]
        for work in sent:
            work.wait()
        return torch.stack(received)

    def turn(self, *tensors: Tensor, purpose: str) -> Arrival:
        """Starts to hand each to the next row and to take the row before's. Returns what waits for these."""
        after, before = (((self.row + d) % self.rows) * self.split + self.column for d in (1, -1))
        tensors = tuple(x.contiguous() for x in tensors)
        sent = [self.comm.send(x, after, purpose=purpose) for x in tensors]
        coming = [self.comm.start_receive(x, before, purpose=purpose) for x in tensors]

        def arrive() -> list[Tensor]:
            for work in (*(work for work, _ in coming), *sent):
                work.wait()
            return [x for _, x in coming]

        return arrive


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mesh: RowsAndColumns,
        codec: KeyCodec,
        tile: type[Tile],
        scale: float,
        sink: Tensor | None,
        q: Tensor,
        kv: Tensor,
    ) -> Tensor:
        (B, T, H, _), widths = q.shape, _widths(q, kv)

        def attend(q: Tensor, kv: Tensor) -> list[Tensor]:
            q, message = mesh.by_heads(q, "queries"), mesh.by_heads(codec.packed(kv, widths), "keys and values")
            softmax = Softmax(q, tile, scale)
            for hop in range(mesh.rows):
                coming = mesh.turn(message, purpose="keys and values") if hop + 1 < mesh.rows else None
                block = codec.unpacked(message, widths, kv.dtype)
                softmax.meet(block, mesh.encounters[hop])
                if coming is not None:
                    (message,) = coming()
            softmax.join(None if sink is None else sink[mesh.heads(len(sink))])
            out = mesh.by_spans(softmax.out.to(q.dtype), B, T, H, "outputs")
            return [out.clone(), softmax.lse]

        out, lse = as_operator(attend, q, kv)
        ctx.save_for_backward(q, kv, sink, out, lse)
        ctx.mesh, ctx.codec, ctx.tile, ctx.scale = mesh, codec, tile, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, kv, sink, out, lse = ctx.saved_tensors
        mesh, (B, T, H, _), G, widths = ctx.mesh, q.shape, kv.shape[2], _widths(q, kv)
        # What was exchanged for heads is exchanged again: kept, it would be as large as the activations.
        grad, out, queries = (mesh.by_heads(x, "queries gradient") for x in (grad, out, q))
        message = mesh.by_heads(ctx.codec.packed(kv, widths), "keys and values")
        dsink = None
        if sink is not None:  # of this column's heads; other ranks have those of others
            own, dsink = mesh.heads(len(sink)), torch.zeros_like(sink)
            dsink[own] = sink_gradient(sink[own], grad, out, lse)
        transpose = Transpose(queries, out, lse, grad, ctx.tile, ctx.scale)
        gradient = lse.new_zeros((*message.shape[:3], sum(widths)))
        returning: Arrival | None = None
        for hop in range(mesh.rows):
            coming = mesh.turn(message, purpose="keys and values") if hop + 1 < mesh.rows else None
            block = ctx.codec.unpacked(message, widths, kv.dtype)
            part = torch.zeros_like(gradient)
            transpose.meet(block, part, mesh.encounters[hop])
            if returning is not None:
                (gradient,) = returning()
            gradient = gradient + part
            if mesh.rows > 1:
                returning = mesh.turn(gradient, purpose="keys and values gradient")
            if coming is not None:
                (message,) = coming()
        if returning is not None:
            (gradient,) = returning()
        dq = mesh.by_spans(transpose.dq, B, T, H, "queries gradient")
        dkv = mesh.by_spans(gradient, B, T, G, "keys and values gradient")
        return None, None, None, None, dsink, dq.to(q.dtype), dkv.to(kv.dtype)


def _widths(q: Tensor, kv: Tensor) -> tuple[int, ...]:
    """The channels of each part of a message about keys and values: of both, or of the one that is both."""
    return (q.shape[-1],) * (kv.shape[-1] // q.shape[-1])
