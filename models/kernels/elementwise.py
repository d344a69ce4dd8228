"""Elementwise recurrences h_t = a_t·h_{t-1} + u_t: every channel of the state decays by itself, none sees another.

There is no matmul in them, only memory to pass over, so time is cut in two levels: all chunks step through their tokens
side by side, a loop over chunks joins them, and a second pass starts each chunk from the state that truly enters it.
T tokens take 2·C + T/C steps instead of T, and no product of decays is ever divided out. Long spans are worked on tile
after tile, so that no tensor is too large to be allocated without fresh pages. The backward pass is the same recurrence
run towards the past (2311.01927 and 1709.04057 use this form): δ_t = ∂h_t + a_{t+1}·δ_{t+1}.

Legend: B spans, T tokens, N chunks, C tokens a chunk, ... the state's own dimensions. Real or complex alike.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.chunking import Begun, Effect
from models.precision import wide

NUMBERS = 1 << 20  # of a tile: 4 MB in fp32


def tiles(*xs: Tensor, size: int) -> Iterator[tuple[Tensor, ...]]:
    """xs [B, T, ...], some whole chunks of tokens at a time: at most `NUMBERS` numbers of the first, or one chunk."""
    tokens = max(NUMBERS // max(xs[0][:, :1].numel(), 1) // size, 1) * size
    return zip(*(x.split(tokens, dim=1) for x in xs), strict=True)


def chunked(x_BT: Tensor, size: int) -> Tensor:
    """[B, T, ...] -> [B, N, C, ...] with C = min(size, T); the last chunk is filled with zeros."""
    B, T, *rest = x_BT.shape
    size = min(size, T)
    if T % size:
        x_BT = F.pad(x_BT, [0, 0] * len(rest) + [0, -T % size])
    return x_BT.reshape(B, -1, size, *rest)


def steps(a: Sequence[Tensor], u: Sequence[Tensor], h: Tensor, outs: Sequence[Tensor]) -> Tensor:
    """h ← a·h + u, step by step, into `outs`, each of which may be the u of its step; returns the last h."""
    for a_c, u_c, out in zip(a, u, outs, strict=True):
        h = torch.addcmul(u_c, a_c, h, out=out)
    return h


class Scan(torch.autograd.Function):
    """h_t = a_t·h_{t-1} + u_t. a, u [B, N, C, ...], state [B, ...] before the first token -> h [B, N, C, ...], and the
    last of it, [B, ...].

    `whole` [B, N, ...] is the product of a over each chunk. The caller knows it more exactly (the exponential of a sum)
    than a product of rounded factors would be, and it decides how a far past weighs; its gradient is in that of a.
    """

    @staticmethod
    def forward(ctx, a: Tensor, whole: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        a_C, u_C = a.unbind(2), u.unbind(2)
        ends = u_C[0].clone()
        steps(a_C[1:], u_C[1:], ends, [ends] * (len(a_C) - 1))
        before = torch.empty_like(ends)
        for n in range(a.shape[1]):
            before[:, n] = state
            state = torch.addcmul(ends[:, n], whole[:, n], state)
        h = torch.empty_like(u, memory_format=torch.contiguous_format)
        steps(a_C, u_C, before, h.unbind(2))
        ctx.save_for_backward(a, whole, h, before)
        return h, state

    @staticmethod
    def backward(ctx, grad: Tensor, at: Tensor) -> tuple[Tensor | None, ...]:
        a, whole, h, before = ctx.saved_tensors
        a_C, grad_C = [x.conj() for x in a.unbind(2)], grad.unbind(2)
        early = torch.zeros_like(before)
        for a_c, grad_c in zip(reversed(a_C), reversed(grad_C), strict=True):
            early.add_(grad_c).mul_(a_c)
        later = torch.empty_like(before)
        for n in reversed(range(a.shape[1])):
            later[:, n] = at
            at = torch.addcmul(early[:, n], whole[:, n].conj(), at)
        grad_a, grad_u = torch.empty_like(h), torch.empty_like(h)
        previous = [before, *h.unbind(2)[:-1]]
        for c in reversed(range(a.shape[2])):
            delta = torch.add(grad_C[c], later, out=grad_u[:, :, c])
            torch.mul(delta, previous[c].conj(), out=grad_a[:, :, c])
            later = torch.mul(delta, a_C[c], out=later)
        return grad_a, None, grad_u, at


class ElementwiseTile:
    """Some tokens of a span: u, g [B, T, ...], starts [B, T]."""

    def __init__(self, size: int, u: Tensor, g: Tensor, starts: Tensor):
        self.T = u.shape[1]
        self.u, g = chunked(wide(u), size), chunked(wide(g), size)
        starts = chunked(starts, size).view(*self.u.shape[:3], *(1,) * (g.dim() - 3))
        self.total = g.sum(2)
        self.a = g.masked_fill(starts, -torch.inf).exp()
        self.whole = self.total.detach().exp().masked_fill(starts.any(2), 0.0)


class ElementwiseSpan(Begun):
    """A span of h_t = e^{g_t}·h_{t-1} + u_t. u, g [B, T, ...] (g log decays), starts [B, T]: `recurrence.Elementwise`.

    The outputs are the states themselves, [B, T, ...] in u's dtype. There is no query, and `scale` multiplies nothing.
    """

    def __init__(self, u: Tensor, g: Tensor, *, starts: Tensor, scale: float | None = None, size: int = 64):
        self.dtype = u.dtype
        self.tiles = [ElementwiseTile(size, *parts) for parts in tiles(u, g, starts, size=size)]
        self.alive = (~starts.any(1)).to(wide(g).dtype)

    @cached_property
    def _from_zero(self) -> tuple[Tensor, Tensor]:
        return run(self.tiles, torch.zeros_like(self.tiles[0].u[:, 0, 0]))

    @cached_property
    def effect(self) -> Effect:
        return Effect(total(self.tiles), self._from_zero[1], self.alive)

    def finish(self, state: Tensor | None) -> Tensor:
        return (self._from_zero if state is None else run(self.tiles, state))[0].to(self.dtype)


def total(tiles: Sequence[Any]) -> Tensor:
    """The sum of the tiles' log decays, [B, ...]."""
    return torch.stack([tile.total.sum(1) for tile in tiles]).sum(0)


def run(tiles: Sequence[Any], state: Tensor) -> tuple[Tensor, Tensor]:
    """Tile after tile, each with its tokens T and the `a`, `whole` and `u` of `Scan`: h [B, T, ...] and its last."""
    outs = []
    for tile in tiles:
        h, state = Scan.apply(tile.a, tile.whole, tile.u, state)
        outs.append(h.flatten(1, 2)[:, : tile.T])
    return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0], state
