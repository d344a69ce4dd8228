"""Causal softmax attention over packed documents, full or within a window, in time and memory of what is seen.

A packed row is a list of runs, each a stretch of one document. A run is cut into parts, queries and the keys that they
see: the run's own causal square and the keys of its past; for a window, `ROWS` queries at a time with the keys that
reach into their windows, and the first tokens of the document, which a window may keep in sight as `sinks` (the
Λ-shaped masks of LM-Infinite, 2308.16137, and StreamingLLM, 2309.17453). Parts of the same queries are merged by their
logsumexps. No mask over the sequence is ever built: time is O(T·window) and memory O(T).

Legend: B rows, T tokens, S keys on the key axis, H heads, G key/value heads, K key width, V value width.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import varlen
from models.kernels.attention_tiles import ROWS, Tile, join_sink, sink_gradient, tile_for
from models.kernels.pieces import Piece
from models.precision import wide
from models.recompute import kept


class AttentionPart(NamedTuple):
    """Queries and keys of a row; see `tiles` for `causal` and `window`. `merged` with what the queries have so far."""

    queries: slice
    keys: slice
    causal: bool = True
    window: int | None = None
    merged: bool = False


def parts_of(run: Piece, key: int, first: int, *, window: int | None = None, sinks: int = 0) -> Iterator[AttentionPart]:
    """The parts of one run. Its token `begin` is at `key` on the key axis, its document's first token at `first`.

    `first` is only told apart from `key - past` where keys between the sinks and the window are no longer held.
    """
    begin, end, past = run
    if window is None or past + end - begin <= window:
        yield AttentionPart(slice(begin, end), slice(key, key + end - begin))
        if past:
            yield AttentionPart(slice(begin, end), slice(key - past, key), causal=False, merged=True)
        return
    at = begin if past else begin + window
    if not past:
        yield AttentionPart(slice(begin, at), slice(key, key + window))
    for a in range(at, end, ROWS):
        b, seen = min(a + ROWS, end), min(past + a - begin, window - 1)
        here = key + a - begin
        yield AttentionPart(slice(a, b), slice(here - seen, here + b - a), window=window)
    # Sink p leaves the window of token p + window: from there on a triangle of them is seen, and at last all.
    leaves, gone = (max(begin, min(end, begin - past + window + p)) for p in (0, sinks))
    if leaves < gone:
        count = past + gone - begin - window
        yield AttentionPart(slice(leaves, gone), slice(first, first + count), merged=True)
    if sinks and gone < end:
        yield AttentionPart(slice(gone, end), slice(first, first + sinks), causal=False, merged=True)


def attend_pieces(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    pieces: list[list[Piece]],
    offsets: list[int],
    *,
    window: int | None = None,
    sinks: int = 0,
    firsts: list[int] | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    tile: type[Tile] | None = None,
) -> Tensor:
    """Attention of each run to its own document's keys up to and including each query. -> [B, T, H, V] in q's dtype.

    `offsets[b]` is the index on the key axis S of span b's first token. A query sees the last `window` of its
    document's tokens, itself included (None: all), and the first `sinks` of them. `firsts[b]` is where the key axis
    has the first token of the document that row b begins in the middle of, if not `past` before its offset. Scale is
    K^-½; G divides H. softcap, sink_logits: as in `models.sequence.Sequence.attend`.
    """
    K, V = k_BSGK.shape[-1], v_BSGV.shape[-1]
    scale = K**-0.5
    if firsts is None:  # a span entered without its past sees what there is
        pieces = [
            [run._replace(past=min(run.past, offset + run.begin)) for run in runs]
            for runs, offset in zip(pieces, offsets, strict=True)
        ]
    plain = tile is None and softcap is None and sink_logits is None
    if plain and not sinks and varlen.runs_on(q_BTHK, max(K, V)):
        q, k, v = (F.pad(x, [0, max(K, V) - x.shape[-1]]) if K != V else x for x in (q_BTHK, k_BSGK, v_BSGV))
        runs_of_all = tuple(tuple(runs) for runs in pieces)
        return varlen.attend(q, k, v, runs_of_all, tuple(offsets), window=window, scale=scale)[..., :V]
    rows = []
    for b, (runs, offset) in enumerate(zip(pieces, offsets, strict=True)):
        row: list[AttentionPart] = []
        for run in runs:
            key = offset + run.begin
            first = key - run.past if firsts is None or run.begin else firsts[b]
            row += parts_of(run, key, first, window=window, sinks=sinks)
        rows.append(row)
    if plain and q_BTHK.device.type != "cpu" and all(p.causal and p.window is None for row in rows for p in row):
        return _squares(q_BTHK, k_BSGK, v_BSGV, rows)
    # The fused kernel reads rows, whatever the strides say.
    q_BTHK, k_BSGK, v_BSGV = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHK, k_BSGK, v_BSGV))
    if K != V:  # the fused kernel wants one width: zeros change neither scores nor the values that are kept
        q_BTHK, k_BSGK, v_BSGV = (F.pad(x, [0, max(K, V) - x.shape[-1]]) for x in (q_BTHK, k_BSGK, v_BSGV))
    tile = tile or tile_for(q_BTHK.device, softcap)
    return _Attend.apply(q_BTHK, k_BSGK, v_BSGV, sink_logits, rows, scale, tile)[..., :V]


def _squares(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, rows: list[list[AttentionPart]]) -> Tensor:
    """Documents that are whole and see all of themselves: what a GPU's own kernels do best."""
    outs = []
    for b, parts in enumerate(rows):
        for part in parts:
            q = q_BTHK[b : b + 1, part.queries].transpose(1, 2)
            k, v = (x[b : b + 1, part.keys].transpose(1, 2) for x in (k_BSGK, v_BSGV))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            outs.append(out.transpose(1, 2)[0])
    return torch.cat(outs).unflatten(0, q_BTHK.shape[:2])


class _Attend(torch.autograd.Function):
    """All parts of all rows, merged in at least fp32. Keeps q, k, v, out and the logsumexps for its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        rows: list[list[AttentionPart]],
        scale: float,
        tile: type[Tile],
    ) -> Tensor:
        out, lse = kept(lambda: _Attend.run(q, k, v, sink, rows, scale, tile))
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.rows, ctx.scale, ctx.tile = rows, scale, tile
        return out

    @staticmethod
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        rows: list[list[AttentionPart]],
        scale: float,
        tile: type[Tile],
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""
        merging = sink is not None or any(part.merged for parts in rows for part in parts)
        precise = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(q, dtype=precise if merging else q.dtype)
        lse = torch.empty(q.shape[:3], dtype=precise, device=q.device).transpose(1, 2)
        for b, parts in enumerate(rows):
            for part in parts:
                part_out, part_lse = tile.forward(*_cut(part, b, q, k, v), part.causal, part.window, scale)
                whole, total = out[b : b + 1, part.queries].transpose(1, 2), lse[b : b + 1, :, part.queries]
                if part.merged:
                    both = torch.logaddexp(total, part_lse)
                    whole.mul_((total - both).exp().unsqueeze(-1))
                    whole.addcmul_(wide(part_out), (part_lse - both).exp().unsqueeze(-1))
                    total.copy_(both)
                else:
                    whole.copy_(part_out)
                    total.copy_(part_lse)
        if sink is not None:
            join_sink(out, lse, sink)
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        grad = grad.contiguous()  # a sum's gradient is one number, expanded: the fused kernel reads it by rows
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        for b, parts in enumerate(ctx.rows):
            for part in parts:
                q_part, k_part, v_part = _cut(part, b, q, k, v)
                g_part, o_part = (x[b : b + 1, part.queries].transpose(1, 2) for x in (grad, out))
                gradients = ctx.tile.backward(
                    g_part,
                    q_part,
                    k_part,
                    v_part,
                    o_part,
                    lse[b : b + 1, :, part.queries],
                    part.causal,
                    part.window,
                    ctx.scale,
                )
                for total, gradient in zip(_cut(part, b, dq, dk, dv), gradients, strict=True):
                    total += gradient
        dsink = None if sink is None else sink_gradient(sink, grad, out, lse)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink, None, None, None


def _cut(part: AttentionPart, b: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A part's views [1, H or G, n or m, K] of row b of q, k, v."""
    q_part = q[b : b + 1, part.queries].transpose(1, 2)
    k_part, v_part = (x[b : b + 1, part.keys].transpose(1, 2) for x in (k, v))
    return q_part, k_part, v_part
