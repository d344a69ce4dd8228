"""Who sees whom, between spans: what every transport of keys and values asks."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.attention_tiles import Tile, join_sink
from models.kernels.pieces import Piece
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


class Softmax:
    """A softmax that is met in parts: out and logsumexp of what has been seen so far, in at least fp32.

    Rows are spans: q [R, T, H, K]; a part is the keys of one other span.
    """

    def __init__(self, q: Tensor, tile: type[Tile], scale: float):
        precise = torch.promote_types(q.dtype, torch.float32)
        self.q, self.tile, self.scale = q, tile, scale
        self.out = torch.zeros_like(q, dtype=precise)
        self.lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=precise, device=q.device)

    def see(self, row: int, k_TGK: Tensor, v_TGV: Tensor, meeting: VisibleKeys) -> None:
        """Row `row` meets the keys of a span."""
        q, k, v = self._cut(self.q[row], k_TGK, v_TGV, meeting)
        out, lse = self.tile.forward(q, k, v, meeting.causal, None, self.scale)
        whole, total = self.out[row, meeting.queries].transpose(0, 1), self.lse[row, :, meeting.queries]
        both = torch.logaddexp(total, lse[0])
        whole.mul_((total - both).exp().unsqueeze(-1))
        whole.addcmul_(out[0].to(whole.dtype), (lse[0] - both).exp().unsqueeze(-1))
        total.copy_(both)

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

    def see(self, row: int, k_TGK: Tensor, v_TGV: Tensor, dk_TGK: Tensor, dv_TGV: Tensor, meeting: VisibleKeys) -> None:
        """Adds to the gradients of the row's queries and of a span's keys and values."""
        q, k, v = Softmax._cut(self.q[row], k_TGK, v_TGV, meeting)
        g, o = (x[row, meeting.queries].transpose(0, 1)[None] for x in (self.grad, self.out))
        lse = self.lse[row, :, meeting.queries][None]
        dq, dk, dv = self.tile.backward(g, q, k, v, o, lse, meeting.causal, None, self.scale)
        self.dq[row, meeting.queries] += dq[0].transpose(0, 1)
        dk_TGK[meeting.keys] += dk[0].transpose(0, 1)
        dv_TGV[meeting.keys] += dv[0].transpose(0, 1)
