"""`gather`: all keys and values on every rank, some heads at a time (LASP-2H, 2502.07563; the Llama-3 report,
2407.21783, section 3.3.2). Documents may start anywhere and spans may differ in length.

The gathered heads are let go once they have been seen, and gathered again in the backward pass, where their gradients
return by a reduce-scatter: what a rank holds at a time does not grow with the number of heads.
"""

from collections.abc import Iterator
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
from parallel.sequence.span_layout import SpanLayout


class GatherKeys:
    """`heads`: key/value heads gathered at a time. keys: the format of keys and values. Raises ValueError for one that
    there is not."""

    def __init__(self, heads: int = 1, keys: KeyFormatName = "exact"):
        self.heads, self.codec = heads, KeyCodec(keys)

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
        q, kv, scale = together(q, k, v, values_in_keys)
        tile = tile_for(q.device, softcap)
        out: Tensor = _Gathered.apply(chain, self.heads, self.codec, tile, scale, sink_logits, q, kv)
        return out[..., : v.shape[-1]]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chain: SpanLayout,
        heads: int,
        codec: KeyCodec,
        tile: type[Tile],
        scale: float,
        sink: Tensor | None,
        q: Tensor,
        kv: Tensor,
    ) -> Tensor:
        encounters = _encounters(chain)

        def attend(q: Tensor, kv: Tensor) -> list[Tensor]:
            outs, lses, at = [], [], 0
            for q_part, kv_part in _strides(q, kv, heads):
                softmax = Softmax(q_part, tile, scale)
                softmax.meet(_gathered(chain, codec, kv_part, q.shape[-1]), encounters)
                own, at = slice(at, at + q_part.shape[2]), at + q_part.shape[2]
                softmax.join(None if sink is None else sink[own])
                outs.append(softmax.out.to(q.dtype))
                lses.append(softmax.lse)
            return [torch.cat(outs, dim=2), torch.cat(lses, dim=1)]

        out, lse = as_operator(attend, q, kv)
        ctx.save_for_backward(q, kv, sink, out, lse)
        ctx.chain, ctx.heads, ctx.codec, ctx.tile, ctx.scale = chain, heads, codec, tile, scale
        ctx.encounters = encounters
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, kv, sink, out, lse = ctx.saved_tensors
        chain = ctx.chain
        dqs, dkvs, at = [], [], 0
        for q_part, kv_part in _strides(q, kv, ctx.heads):
            heads = slice(at, at := at + q_part.shape[2])
            transpose = Transpose(q_part, out[:, :, heads], lse[:, heads], grad[:, :, heads], ctx.tile, ctx.scale)
            blocks = _gathered(chain, ctx.codec, kv_part, q.shape[-1])
            gradients = torch.zeros_like(blocks, dtype=lse.dtype)
            transpose.meet(blocks, gradients, ctx.encounters)
            part = chain.comm.reduce_scatter(gradients, purpose="keys and values gradient")
            dqs.append(transpose.dq)
            dkvs.append(part[: kv.shape[0], : kv.shape[1]])
        dsink = None if sink is None else sink_gradient(sink, grad, out, lse)
        dq, dkv = torch.cat(dqs, dim=2).to(q.dtype), torch.cat(dkvs, dim=2).to(kv.dtype)
        return None, None, None, None, None, dsink, dq, dkv


def _encounters(chain: SpanLayout) -> Encounters:
    """This rank's spans with all before them, in the order of the sequence."""
    return Encounters(
        Encounter(row, (link.rank, link.row), meeting)
        for row, n in enumerate(chain.mine)
        for link in chain.links[: n + 1]
        for meeting in meetings(chain, chain.links[n], link)
    )


def _strides(q_BTHK: Tensor, kv_BTGW: Tensor, heads: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some key/value heads at a time, with the query heads that see them."""
    shared = q_BTHK.shape[2] // kv_BTGW.shape[2]
    for kv in kv_BTGW.split(heads, dim=2):
        count = kv.shape[2] * shared
        yield q_BTHK[:, :, :count], kv
        q_BTHK = q_BTHK[:, :, count:]


def _gathered(chain: SpanLayout, codec: KeyCodec, kv: Tensor, width: int) -> Tensor:
    """[B, T, G, W or 2W] of this rank -> [P, rows, longest, G, the same] of all, in its dtype. width: W."""
    widths = (width,) * (kv.shape[-1] // width)
    message = _padded(chain, codec.packed(kv, widths))
    return codec.unpacked(chain.comm.all_gather(message, purpose="keys and values"), widths, kv.dtype)


def _padded(chain: SpanLayout, x: Tensor) -> Tensor:
    """[B, T, ...] -> [rows, longest, ...], the same on every rank."""
    B, T = x.shape[:2]
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, chain.longest - T, 0, chain.rows - B])
