"""Decays inside a chunk: scores between tokens, reads of the state that enters, writes to the one that leaves.

With G_t the sum of the log decays of a chunk's tokens up to t, for a reader r (a query, or a key that looks back):

    scores_ts = Σ_k r_tk k_sk e^{G_tk - G_sk}, s ≤ t     reads_t = r_t e^{G_t}     writes_s = k_s e^{G_C - G_s}

and the state that enters is multiplied by kept = e^{G_C}. No factor may have a positive exponent, or it overflows as
soon as something is forgotten. One decay a head makes a [C, C] mask of differences. One a channel cannot be taken out
of the sum over k: there scores are built from blocks that double, each split at its middle, where what is read decays
since the middle and what was written decays up to it; two sums grow with the blocks, of the same sign throughout, so
that nothing cancels. The gradient of a log decay needs no new product: r·∂r - k·∂k, summed from the end of the chunk.

Plain autograd would pass over the tokens some hundred times for this; the gradients below are written out.

Legend: N chunks, B spans, H heads, C tokens a chunk, K key width. Everything is [N, B, H, C, ...], fp32 or better.
Source: gated linear attention, 2312.06635, section 4 (the secondary chunks), with halves for its sub-chunks of 16.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels.chunking import Segments

SMALL = 16  # blocks up to this many tokens are one masked matmul: smaller ones cost more to cut out than to multiply
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
        levels, until, after = _levels(g)
        scores = [*memo] or [s.mul_(seen.visible) for s in _scores(readers, k, levels)]
        memo[:] = [s.detach() for s in scores]
        read = until.exp().mul_(seen.first.unsqueeze(-1))
        write = after.exp_().mul_(seen.last.unsqueeze(-1))
        carry = until[..., -1, :].exp() * seen.alive.unsqueeze(-1)
        reads = [r * read for r in readers]
        writes = k * write
        ctx.save_for_backward(k, read, write, carry, seen.visible, *readers, *levels)
        ctx.readers = len(readers)
        return carry, writes, *scores, *reads

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        k, read, write, carry, visible, *rest = ctx.saved_tensors
        count = ctx.readers
        readers, levels = rest[:count], rest[count:]
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
        _scores_backward(readers, k, levels, d_scores, d_readers, d_k)
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


def _levels(g: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Decays to and from the middles of blocks of 2, 4, ... C tokens, and log decays in the chunk up to and after t.

    A small block's decays are one tensor like g; a large one's are two, of its first half and of its second. The sums
    in small blocks are matmuls with zeros and ones, which a processor does faster than additions of short rows.
    """
    C = g.shape[-2]
    size = min(C, SMALL)
    blocks, sums = _small(g, size), _sums(size, g.dtype, g.device)
    levels = [torch.matmul(one, blocks).exp_().view_as(g) for one in sums[:-2]]
    until, after = (torch.matmul(one, blocks).view_as(g) for one in sums[-2:])
    h = size
    while h < C:
        shape = (*g.shape[:-2], C // (2 * h), 2, h, g.shape[-1])
        (until_1, until_2), after_1 = until.view(shape).unbind(-3), after.view(shape)[..., 0, :, :]
        levels += [after_1.exp(), until_2.exp()]
        total_1, total_2 = until_1[..., -1:, :], until_2[..., -1:, :].clone()
        until_2 += total_1
        after_1 += total_2
        h *= 2
    return levels, until, after


@lru_cache(maxsize=16)  # every tile of every layer asks for the same
def _sums(size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Matrices [size, size] that sum log decays: for each level from the middle or up to it, then up to t, and after t.

    At level h a token of a second half decays since the half began, one of a first half until it ends.
    """
    t, s = torch.meshgrid(*[torch.arange(size, device=device)] * 2, indexing="ij")
    matrices, h = [], 1
    while h < size:
        same, second = t // h == s // h, (t // h) % 2 == 1
        matrices.append(same & torch.where(second, s <= t, s > t))
        h *= 2
    return [m.to(dtype) for m in (*matrices, s <= t, s > t)]


def _small(x: Tensor, size: int) -> Tensor:
    """[..., C, K] -> [rows, size, K]."""
    return x.reshape(-1, size, x.shape[-1])


@lru_cache(maxsize=64)
def _mask(h: int, size: int, readers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[readers * size, size]: 1 where the row is in the second and the column in the first half of one block of 2h."""
    at = torch.arange(size, device=device) // h
    return ((at.unsqueeze(-1) == at + 1) & (at % 2 == 0)).to(dtype).repeat(readers, 1)


def _diagonal_blocks(scores: Tensor, size: int) -> Tensor:
    """A view [..., C / size, size, size] of the blocks of [..., C, C] on the diagonal."""
    n = scores.shape[-1] // size
    blocks = scores.unflatten(-1, (n, size)).unflatten(-3, (n, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    return x.unflatten(-2, (-1, 2, h)).unbind(-3)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def _stack(xs: Sequence[Tensor], size: int) -> Tensor:
    """Several [..., C, K] -> [rows, readers * size, K]: matmuls with the same keys are one."""
    return torch.cat([_small(x, size) for x in xs], 1) if len(xs) > 1 else _small(xs[0], size)


def _times(stacked: Tensor, factor: Tensor) -> Tensor:
    """Every reader of `_stack` times factor [rows, size, K]."""
    return (stacked.unflatten(1, (-1, factor.shape[1])) * factor.unsqueeze(1)).flatten(1, 2)


def _scores(readers: Sequence[Tensor], k: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """Scores of each reader with each key, [..., C, C]; levels as `_levels` gives them."""
    C, n = k.shape[-2], len(readers)
    size = min(C, SMALL)
    outs = [k.new_zeros(*k.shape[:-1], C) for _ in readers]
    reading = _stack(readers, size)
    blocks = torch.cat([torch.diag_embed(_small(r * k, size).sum(-1)) for r in readers], 1)
    h, remaining = 1, iter(levels)
    while 2 * h <= size:
        factor = _small(next(remaining), size)
        square = torch.bmm(_times(reading, factor), (_small(k, size) * factor).mT)
        blocks.addcmul_(square, _mask(h, size, n, k.dtype, k.device))
        h *= 2
    for out, block in zip(outs, blocks.chunk(n, 1), strict=True):
        _diagonal_blocks(out, size).copy_(block.unflatten(0, (*k.shape[:-2], -1)))
    while h < C:
        to, since = next(remaining), next(remaining)
        square = torch.bmm(_stack([_halves(r, h)[1] * since for r in readers], h), _flat(_halves(k, h)[0] * to).mT)
        for out, block in zip(outs, square.chunk(n, 1), strict=True):
            _diagonal_blocks(out, 2 * h)[..., h:, :h].copy_(block.unflatten(0, to.shape[:-2]))
        h *= 2
    return outs


def _scores_backward(
    readers: Sequence[Tensor],
    k: Tensor,
    levels: Sequence[Tensor],
    d_outs: Sequence[Tensor],
    d_readers: Sequence[Tensor],
    d_k: Tensor,
) -> None:
    """Adds to d_readers and d_k what d_outs, the gradients of the scores, give them through pairs of two tokens."""
    C, n = k.shape[-2], len(readers)
    size = min(C, SMALL)
    reading = _stack(readers, size)
    d_blocks = _stack([_flat(_diagonal_blocks(d, size)) for d in d_outs], size)
    h, remaining = 1, iter(levels)
    while 2 * h <= size:
        factor, d_square = _small(next(remaining), size), d_blocks * _mask(h, size, n, k.dtype, k.device)
        d_reading = torch.bmm(d_square, _small(k, size) * factor)
        for d_r, part in zip(d_readers, d_reading.chunk(n, 1), strict=True):
            d_r.view_as(factor).addcmul_(part, factor)
        d_k.view_as(factor).addcmul_(torch.bmm(d_square.mT, _times(reading, factor)), factor)
        h *= 2
    while h < C:
        to, since = next(remaining), next(remaining)
        d_square = _stack([_flat(_diagonal_blocks(d, 2 * h)[..., h:, :h]) for d in d_outs], h)
        d_reading = torch.bmm(d_square, _flat(_halves(k, h)[0] * to))
        d_written = torch.bmm(d_square.mT, _stack([_halves(r, h)[1] * since for r in readers], h))
        for d_r, part in zip(d_readers, d_reading.chunk(n, 1), strict=True):
            _halves(d_r, h)[1].addcmul_(part.unflatten(0, since.shape[:-2]), since)
        _halves(d_k, h)[0].addcmul_(d_written.view_as(to), to)
        h *= 2
