"""Scores between two tokens of a chunk whose states decay by channel: Σ_k r_tk k_sk e^{G_tk - G_sk}, s < t, in matmuls.

The exponent cannot be taken out of the sum over k; it is split at a token in between, m: r_t e^{G_t - G_m} meets
k_s e^{G_m - G_s}.

- `FromStart`: where no channel of any chunk forgets more than e^WEAK, all pairs are split at the chunk's start, or at
  their document's. One matmul; e^{-G_s} is above one, but far from overflow, and exponents lose log2 WEAK bits.
- `Doubling`: where something is forgotten, no factor may have a positive exponent, or it overflows. Blocks of 2, 4, ...
  C tokens are each split at their own middle, where what is read decays since the middle and what was written decays
  up to it; two sums grow with the blocks, of the same sign throughout, so that nothing cancels.

The first needs to look at the decays, which is free only on a CPU. On the meta device decays count as strong, so that
the memory of a step is not foretold too low. Everything is [N, B, H, C, K], fp32 or better; legend in
`models.kernels.decay`.
Source: gated linear attention, 2312.06635, section 4 (the secondary chunks), with halves for its sub-chunks of 16.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

WEAK = 8.0  # of log decay, over a chunk
SMALL = 16  # blocks up to this many tokens are one masked matmul: smaller ones cost more to cut out than to multiply


class Splitting(Protocol):
    """One of the two ways."""

    @staticmethod
    def factors(g: Tensor, visible: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Decays to and from the tokens in between, the decay e^{G_t} of what enters the chunk, and the log decay
        after t, both right where no document starts before, or after it. g [..., C, K], visible as of `Segments`."""
        ...

    @staticmethod
    def scores(readers: Sequence[Tensor], k: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        """Scores of each reader with each key, [..., C, C], right where s ≤ t."""
        ...

    @staticmethod
    def backward(
        readers: Sequence[Tensor],
        k: Tensor,
        factors: Sequence[Tensor],
        d_scores: Sequence[Tensor],
        d_readers: Sequence[Tensor],
        d_k: Tensor,
    ) -> None:
        """Adds to d_readers and d_k what d_scores, zero where s > t, give them through pairs of two tokens."""
        ...


def pairs_of(g: Tensor) -> type[Splitting]:
    """The way for log decays g [..., C, K]."""
    if g.device.type != "cpu" or not g.numel():
        return Doubling
    return FromStart if g.amax() <= 0 and g.sum(-2).amin() >= -WEAK else Doubling


class FromStart:
    """All pairs split at the start of the chunk, or of their document in it."""

    @staticmethod
    def factors(g: Tensor, visible: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        C = g.shape[-2]
        sums = torch.ones(C, C, dtype=torch.bool, device=g.device).tril()
        # A sum that went on through documents would be rounded as those before it say.
        if not visible[..., 0].all():
            sums = visible
        total = sums.to(g.dtype) @ g
        since = total.exp()
        return [since, total.neg().exp_()], since, total[..., -1:, :] - total

    @staticmethod
    def scores(readers: Sequence[Tensor], k: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        since, to = factors
        written = (k * to).mT
        return [(r * since) @ written for r in readers]

    @staticmethod
    def backward(
        readers: Sequence[Tensor],
        k: Tensor,
        factors: Sequence[Tensor],
        d_scores: Sequence[Tensor],
        d_readers: Sequence[Tensor],
        d_k: Tensor,
    ) -> None:
        since, to = factors
        written = k * to
        for r, d, d_r in zip(readers, d_scores, d_readers, strict=True):
            between = d.tril(-1)
            d_r.addcmul_(between @ written, since)
            d_k.addcmul_(between.mT @ (r * since), to)


class Doubling:
    """Each pair split at the middle of the smallest block that holds both."""

    @staticmethod
    def factors(g: Tensor, visible: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """A small block's decays are one tensor like g; a large one's are two, of its first half and of its second. The
        sums in small blocks are matmuls with zeros and ones: faster on a processor than additions of short rows."""
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
        return levels, until.exp_(), after

    @staticmethod
    def scores(readers: Sequence[Tensor], k: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        C, n = k.shape[-2], len(readers)
        size = min(C, SMALL)
        outs = [k.new_zeros(*k.shape[:-1], C) for _ in readers]
        reading = _stack(readers, size)
        blocks = torch.cat([torch.diag_embed(_small(r * k, size).sum(-1)) for r in readers], 1)
        h, remaining = 1, iter(factors)
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

    @staticmethod
    def backward(
        readers: Sequence[Tensor],
        k: Tensor,
        factors: Sequence[Tensor],
        d_scores: Sequence[Tensor],
        d_readers: Sequence[Tensor],
        d_k: Tensor,
    ) -> None:
        C, n = k.shape[-2], len(readers)
        size = min(C, SMALL)
        reading = _stack(readers, size)
        d_blocks = _stack([_flat(_diagonal_blocks(d, size)) for d in d_scores], size)
        h, remaining = 1, iter(factors)
        while 2 * h <= size:
            factor, d_square = _small(next(remaining), size), d_blocks * _mask(h, size, n, k.dtype, k.device)
            d_reading = torch.bmm(d_square, _small(k, size) * factor)
            for d_r, part in zip(d_readers, d_reading.chunk(n, 1), strict=True):
                d_r.view_as(factor).addcmul_(part, factor)
            d_k.view_as(factor).addcmul_(torch.bmm(d_square.mT, _times(reading, factor)), factor)
            h *= 2
        while h < C:
            to, since = next(remaining), next(remaining)
            d_square = _stack([_flat(_diagonal_blocks(d, 2 * h)[..., h:, :h]) for d in d_scores], h)
            d_reading = torch.bmm(d_square, _flat(_halves(k, h)[0] * to))
            d_written = torch.bmm(d_square.mT, _stack([_halves(r, h)[1] * since for r in readers], h))
            for d_r, part in zip(d_readers, d_reading.chunk(n, 1), strict=True):
                _halves(d_r, h)[1].addcmul_(part.unflatten(0, since.shape[:-2]), since)
            _halves(d_k, h)[0].addcmul_(d_written.view_as(to), to)
            h *= 2


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
