"""Decays inside a chunk: scores between tokens, reads of the state that enters, writes to the one that leaves.

With G_t the sum of the log decays of a chunk's tokens up to t, for a reader r (a query, or a key that looks back):

    scores_ts = Σ_k r_tk k_sk e^{G_tk - G_sk}, s ≤ t     reads_t = r_t e^{G_t}     writes_s = k_s e^{G_C - G_s}

and the state that enters is multiplied by kept = e^{G_C}. No factor may have a positive exponent, or it overflows as
soon as something is forgotten. One decay a head makes a [C, C] mask of differences. One a channel cannot be taken out
of the sum over k: `models.kernels.decay_pairs` builds those scores. The gradient of a log decay needs no new product:
r·∂r - k·∂k, summed from the end of the chunk.

Plain autograd would pass over the tokens some hundred times for this; the gradients below are written out.

Legend: N chunks, B spans, H heads, C tokens a chunk, K key width. Everything is [N, B, H, C, ...], fp32 or better.
Source: gated linear attention, 2312.06635, section 4 (the secondary chunks), with halves for its sub-chunks of 16.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels.chunking import Segments
from models.kernels.decay_pairs import pairs_of

SMALL_STATE = 128 * 64  # numbers of a head's state


def chunk_size(k: Tensor, v: Tensor, g: Tensor | None) -> int:
    """Returns the tokens of a chunk. Decays by channel are worked on once for every doubling of it, so it is smaller
    for them, unless states are so large that passing over one for each chunk costs more. k, v and g [B, T, H, ...]."""
    by_channel = g is not None and g.dim() == k.dim()
    size = 32 if by_channel and k.shape[-1] * v.shape[-1] <= SMALL_STATE else 64
    return min(size, 1 << (k.shape[1] - 1).bit_length())


class Decayed(NamedTuple):
    """One chunk's keys and readers, with decays and document starts taken into account."""

    kept: Tensor  # [N, B, H, 1 or K], what is left of the incoming state
    writes: Tensor  # [N, B, H, C, K]
    scores: tuple[Tensor, ...]  # a reader [N, B, H, C, C], lower triangular
    reads: tuple[Tensor, ...]  # a reader [N, B, H, C, K]


def decayed(g: Tensor | None, k: Tensor, *readers: Tensor, seen: Segments, memo: list[Tensor]) -> Decayed:
    """g: None, [N, B, H, C] a head, or [N, B, H, C, K] a channel; k and each reader [N, B, H, C, K].

    The scores of decays by channel cost more than all the rest: they are taken from `memo`, or left there if it is
    empty, for whoever computes the same again.
    """
    if g is None or g.dim() < k.dim():
        carry, writes, *rest = PerHead.apply(g, k, seen, *readers)  # type: ignore[no-untyped-call]
    else:
        carry, writes, *rest = PerChannel.apply(g, k, seen, memo, *readers)  # type: ignore[no-untyped-call]
    return Decayed(carry, writes, tuple(rest[: len(readers)]), tuple(rest[len(readers) :]))


class PerHead(torch.autograd.Function):
    """One log decay a head, or none."""

    @staticmethod
    def forward(ctx: Any, g: Tensor | None, k: Tensor, seen: Segments, *readers: Tensor) -> tuple[Tensor, ...]:
        first, last, alive = (x.to(k.dtype) for x in (seen.first, seen.last, seen.alive))
        if g is None:
            decay, read, write, carry = seen.visible.to(k.dtype), first, last, alive
        else:
            # Differences of long sums cancel: in fp32 they cost dt_bias and A_log two thirds of their accuracy.
            sums = g.double().cumsum(-1)
            between = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(g.dtype)
            decay = between.masked_fill_(~seen.visible, -torch.inf).exp_()
            read = sums.to(g.dtype).exp() * first
            write = (sums[..., -1:] - sums).to(g.dtype).exp() * last
            carry = sums[..., -1].to(g.dtype).exp() * alive
        read, write = read.unsqueeze(-1), write.unsqueeze(-1)
        scores = [(r @ k.mT).mul_(decay) for r in readers]
        reads = [r * read for r in readers]
        writes = k * write
        carry = carry.unsqueeze(-1).expand(*k.shape[:3], 1)
        ctx.save_for_backward(k, decay, read, write, carry, writes, *readers, *reads, *scores)
        ctx.gated = g is not None
        return carry, writes, *scores, *reads

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        k, decay, read, write, carry, writes, *rest = ctx.saved_tensors
        count = len(rest) // 3
        readers, reads, scores = rest[:count], rest[count : 2 * count], rest[2 * count :]
        d_kept, d_writes, d_scores, d_reads = (
            gradients[0],
            gradients[1],
            gradients[2 : 2 + count],
            gradients[2 + count :],
        )
        d_k, d_readers, d_sums = d_writes * write, [], None
        if ctx.gated:
            at_end = (d_writes * writes).sum(-1).double()
            d_sums = -at_end
            d_sums[..., -1] += at_end.sum(-1) + (d_kept * carry).squeeze(-1)
        for r, reading, score, d_score, d_reading in zip(readers, reads, scores, d_scores, d_reads, strict=True):
            raw = d_score * decay
            d_k += raw.mT @ r
            d_readers.append(torch.addcmul(raw @ k, d_reading, read))
            if d_sums is not None:
                flow = d_score * score
                flow.diagonal(dim1=-2, dim2=-1).zero_()
                d_sums += flow.sum(-1, dtype=torch.float64) - flow.sum(-2, dtype=torch.float64)
                d_sums += (d_reading * reading).sum(-1)
        d_g = None if d_sums is None else d_sums.flip(-1).cumsum(-1).flip(-1).to(k.dtype)
        return d_g, d_k, None, *d_readers


class PerChannel(torch.autograd.Function):
    """One log decay a key channel."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, k: Tensor, seen: Segments, memo: list[Tensor], *readers: Tensor
    ) -> tuple[Tensor, ...]:
        pairs = pairs_of(g)
        factors, since, after = pairs.factors(g, seen.visible)
        scores = [*memo] or [s.mul_(seen.visible) for s in pairs.scores(readers, k, factors)]
        memo[:] = [s.detach() for s in scores]
        read = since * seen.first.unsqueeze(-1)
        write = after.exp_().mul_(seen.last.unsqueeze(-1))
        carry = since[..., -1, :] * seen.alive.unsqueeze(-1)
        reads = [r * read for r in readers]
        writes = k * write
        ctx.save_for_backward(k, read, write, carry, seen.visible, *readers, *factors)
        ctx.readers, ctx.pairs = len(readers), pairs
        return carry, writes, *scores, *reads

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        k, read, write, carry, visible, *rest = ctx.saved_tensors
        count = ctx.readers
        readers, factors = rest[:count], rest[count:]
        d_kept, d_writes, d_scores, d_reads = (
            gradients[0],
            gradients[1],
            gradients[2 : 2 + count],
            gradients[2 + count :],
        )
        d_k = d_writes.contiguous() * write  # contiguous: added to in place, by views
        at_end = (d_k * k).sum(-2).addcmul_(d_kept, carry)
        d_readers = [d.contiguous() * read for d in d_reads]
        d_scores = tuple(d * visible for d in d_scores)
        self_scores = [d.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) for d in d_scores]
        ctx.pairs.backward(readers, k, factors, d_scores, d_readers, d_k)
        # A token's score on itself does not decay: it enters r·∂r and k·∂k alike, so both are taken without it.
        d_sums = -(k * d_k)
        for r, d_r in zip(readers, d_readers, strict=True):
            d_sums.addcmul_(r, d_r)
        d_sums[..., -1, :] += at_end
        later = torch.ones(k.shape[-2], k.shape[-2], dtype=k.dtype, device=k.device).triu()
        d_g = later @ d_sums
        for r, d_r, d_self in zip(readers, d_readers, self_scores, strict=True):
            d_k.addcmul_(d_self, r)
            d_r.addcmul_(d_self, k)
        return d_g, d_k, None, None, *d_readers
