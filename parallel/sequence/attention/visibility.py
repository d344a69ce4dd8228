"""Who sees whom, between spans: what every transport of keys and values asks."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import varlen_parts
from models.kernels.attention_tiles import Tile, join_sink
from models.kernels.pieces import Piece
from models.kernels.varlen_parts import PartsCall, TokenStretch, cut, parts_call
from models.precision import wide
from parallel.sequence.span_layout import Link, SpanLayout


class Keys(Protocol):
    """A way to attend to keys that lie on several ranks."""

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
        """q [B,T,H,K], k [B,T,G,K], v [B,T,G,V] of this rank's spans -> [B,T,H,V]; see `Sequence.attend`."""
        ...


class VisibleKeys(NamedTuple):
    """Queries of one span that see keys of another: slices of the two spans' own tokens. `causal` within a span."""

    queries: slice
    keys: slice
    causal: bool


def meetings(chain: SpanLayout, queries: Link, keys: Link) -> Iterator[VisibleKeys]:
    """Every stretch of `queries` that sees tokens of `keys`: those of its own documents, itself included."""
    if keys.begin > queries.begin:
        return
    documents = chain.documents_of(queries)
    if keys == queries:
        for _, begin, end in documents:
            yield VisibleKeys(
                slice(begin - queries.begin, end - queries.begin),
                slice(begin - queries.begin, end - queries.begin),
                True,
            )
        return
    first, begin, end = documents[0]  # only this one may have begun in an earlier span
    low = max(first, keys.begin)
    if low < keys.end:
        yield VisibleKeys(
            slice(begin - queries.begin, end - queries.begin), slice(low - keys.begin, keys.end - keys.begin), False
        )


def together(q: Tensor, k: Tensor, v: Tensor, values_in_keys: bool = False) -> tuple[Tensor, Tensor, float]:
    """q, [k | v] for one message, and the scale: all of the wider one's width, since fused kernels know only one.
    values_in_keys: the message is k alone, and what is read beyond the width of v means nothing."""
    scale = q.shape[-1] ** -0.5
    if values_in_keys:
        return q, k, scale
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (F.pad(x, [0, width - x.shape[-1]]) if x.shape[-1] < width else x for x in (q, k, v))
    return q, torch.cat((k, v), dim=-1), scale


def apart(kv: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The keys and the values of such a message, or of its gradient, for queries of a width. Where one is both, it is
    given twice: what is added to either is added to it."""
    if kv.shape[-1] == width:
        return kv, kv
    k, v = kv.chunk(2, dim=-1)
    return k, v


class Encounter(NamedTuple):
    """Queries of a row that see keys of a span: these lie where `at` indexes a tensor [..., T, G, W or 2W]."""

    row: int
    at: tuple[int, ...]
    meeting: VisibleKeys


class Encounters:
    """All queries that see keys of one block of spans."""

    def __init__(self, each: Iterable[Encounter]):
        self.each = list(each)

    @cached_property
    def calls(self) -> list[PartsCall]:
        """The same for a kernel that takes all documents together. Queries that see keys of several spans have these
        end to end, those of their own span last; so no query is twice in a call, whatever the number of documents."""
        seen: dict[TokenStretch, list[TokenStretch]] = {}
        causal = set()
        for row, at, (queries, keys, last) in self.each:
            asking = TokenStretch((row,), queries.start, queries.stop)
            seen.setdefault(asking, []).append(TokenStretch(at, keys.start, keys.stop))
            if last:
                causal.add(asking)
        ways = {way: sorted(asking for asking in seen if (asking in causal) == way) for way in (True, False)}
        return [parts_call(((a, seen[a]) for a in asking), way) for way, asking in ways.items() if asking]


def _together_on(q: Tensor, tile: type[Tile]) -> bool:
    """Says whether a kernel takes all documents of such queries together: none has a cap of scores."""
    return getattr(tile, "softcap", None) is None and varlen_parts.runs_on(q)


class Softmax:
    """A softmax that is met in parts: out and logsumexp of what has been seen so far, in at least fp32.

    Rows are spans: q [R, T, H, K]; a part is the keys of one other span, or all documents' of a block of spans.
    """

    def __init__(self, q: Tensor, tile: type[Tile], scale: float):
        precise = torch.promote_types(q.dtype, torch.float32)
        self.q, self.tile, self.scale = q, tile, scale
        self._begun: set[tuple[int, ...]] = set()  # rows that have seen something
        self.out = torch.zeros_like(q, dtype=precise)
        self.lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=precise, device=q.device)

    def meet(self, kv: Tensor, encounters: Encounters) -> None:
        """Meets a block of keys and values [..., T, G, W or 2W]; see `together`."""
        width = self.q.shape[-1]
        if not _together_on(self.q, self.tile):
            for row, where, meeting in encounters.each:
                self._see(row, *apart(kv[where], width), meeting)
            return
        for call in encounters.calls:
            k, v = apart(cut(kv, call.keys), width)
            out, lse = varlen_parts.forward(call, cut(self.q, call.queries), k, v, self.scale)
            sizes = [stretch.length for stretch in call.queries]
            fresh = {stretch.at for stretch in call.queries} - self._begun
            parts = zip(call.queries, out.split(sizes), lse.split(sizes, dim=1), strict=True)
            for (at, begin, end), part, part_lse in parts:
                whole, total = self.out[at][begin:end].transpose(0, 1), self.lse[at][:, begin:end]
                if at in fresh:  # no query is twice in a call
                    whole.copy_(part.transpose(0, 1))
                    total.copy_(part_lse)
                else:
                    self._merge(whole, total, part.transpose(0, 1), part_lse)
            self._begun |= fresh

    def _see(self, row: int, k_TGK: Tensor, v_TGV: Tensor, meeting: VisibleKeys) -> None:
        """Row `row` meets the keys of a span."""
        q, k, v = self._cut(self.q[row], k_TGK, v_TGV, meeting)
        out, lse = self.tile.forward(q, k, v, meeting.causal, None, self.scale)
        whole, total = self.out[row, meeting.queries].transpose(0, 1), self.lse[row, :, meeting.queries]
        self._merge(whole, total, out[0], lse[0])

    @staticmethod
    def _merge(whole_HnK: Tensor, total_Hn: Tensor, part_HnK: Tensor, lse_Hn: Tensor) -> None:
        """Adds a part to what has been seen, in place."""
        both = torch.logaddexp(total_Hn, lse_Hn)
        whole_HnK.mul_((total_Hn - both).exp().unsqueeze(-1))
        whole_HnK.addcmul_(part_HnK.to(whole_HnK.dtype), (lse_Hn - both).exp().unsqueeze(-1))
        total_Hn.copy_(both)

    def join(self, sink_H: Tensor | None) -> None:
        """Ends with logits that have no value, where there are some."""
        if sink_H is not None:
            join_sink(self.out, self.lse, sink_H)

    @staticmethod
    def _cut(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, meeting: VisibleKeys) -> tuple[Tensor, Tensor, Tensor]:
        q = q_THK[meeting.queries].transpose(0, 1)[None]
        k, v = (x[meeting.keys].transpose(0, 1)[None] for x in (k_TGK, v_TGV))
        return q, k, v


class Transpose:
    """The gradients of a softmax that was met in parts, from its out and logsumexp; the parts simply add up."""

    def __init__(self, q: Tensor, out: Tensor, lse: Tensor, grad: Tensor, tile: type[Tile], scale: float):
        self.q, self.out, self.lse, self.grad = q, out, lse, grad.contiguous()
        self.tile, self.scale = tile, scale
        self.dq = torch.zeros_like(q, dtype=lse.dtype)

    def meet(self, kv: Tensor, dkv: Tensor, encounters: Encounters) -> None:
        """Adds to the gradients of the queries and of a block of keys and values, dkv in the shape of kv."""
        width = self.q.shape[-1]
        if not _together_on(self.q, self.tile):
            for row, at, meeting in encounters.each:
                self._see(row, *apart(kv[at], width), *apart(dkv[at], width), meeting)
            return
        for call in encounters.calls:
            k, v = apart(cut(kv, call.keys), width)
            q, g, o = (cut(x, call.queries) for x in (self.q, self.grad, self.out))
            lse = torch.cat([self.lse[at][:, begin:end] for at, begin, end in call.queries], dim=1)
            dq, dk, dv = varlen_parts.backward(call, g, q, k, v, o, lse, self.scale)
            _add(self.dq, call.queries, dq)
            _add(dkv, call.keys, torch.cat((dk, dv), dim=-1) if kv.shape[-1] > width else wide(dk) + wide(dv))

    def _see(
        self, row: int, k_TGK: Tensor, v_TGV: Tensor, dk_TGK: Tensor, dv_TGV: Tensor, meeting: VisibleKeys
    ) -> None:
        """Adds to the gradients of the row's queries and of a span's keys and values."""
        q, k, v = Softmax._cut(self.q[row], k_TGK, v_TGV, meeting)
        g, o = (x[row, meeting.queries].transpose(0, 1)[None] for x in (self.grad, self.out))
        lse = self.lse[row, :, meeting.queries][None]
        dq, dk, dv = self.tile.backward(g, q, k, v, o, lse, meeting.causal, None, self.scale)
        self.dq[row, meeting.queries] += dq[0].transpose(0, 1)
        dk_TGK[meeting.keys] += dk[0].transpose(0, 1)
        dv_TGV[meeting.keys] += dv[0].transpose(0, 1)


def _add(total: Tensor, stretches: tuple[TokenStretch, ...], x_NHK: Tensor) -> None:
    """Adds what lies end to end to the stretches that it belongs to."""
    parts = x_NHK.split([stretch.length for stretch in stretches])
    for (at, begin, end), part in zip(stretches, parts, strict=True):
        total[at][begin:end] += part
