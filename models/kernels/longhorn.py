"""Longhorn (Liu et al. 2024, 2407.14207): an elementwise recurrence over D×N, read over N by a query.

S_t = (1 - Δ_t k_t²)·S_{t-1} + Δ_t x_t k_tᵀ, y_t = S_t q_t: the diagonal of the online least-squares update. The states
of all tokens, [T, D, N], are N times the layer's activations, so they exist for one block of tokens at a time: a pass
keeps the state at each block's border, and its gradient walks the block again from there. Blocks are small, so that
they stay in cache; a step has D·N numbers to work on, enough for tokens to take their turn one by one.

Legend: B spans, T tokens, C tokens a block, D channels, N the state's width.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.kernels.chunking import Begun, Effect, scaled
from models.kernels.elementwise import steps
from models.precision import wide

SIZE = 32  # tokens a block


def outer(x: Tensor, y: Tensor) -> Tensor:
    """[..., D], [..., N] -> [..., D, N]."""
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def read(S: Tensor, x: Tensor) -> Tensor:
    """Σ_n S_dn x_n: [..., D, N], [..., N] -> [..., D]."""
    return (S @ x.unsqueeze(-1)).squeeze(-1)


def walk(state: Tensor, k: Tensor, v: Tensor, delta: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The decays and the states [B, C, D, N] of a block entered with `state` [B, D, N]."""
    a = torch.addcmul(k.new_ones(()), delta.unsqueeze(-1), k.square().unsqueeze(-2), value=-1)
    a = a.mul_(inside(starts, a))
    S = outer(delta * v, k)
    steps(a.unbind(1), S.unbind(1), state, S.unbind(1))
    return a, S


def inside(starts: Tensor, like: Tensor) -> Tensor:
    """[B, C, 1, 1], 0 where a document starts and nothing of the past remains."""
    return (~starts[..., None, None]).to(like.dtype)


def blocks(*xs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(SIZE, dim=1) for x in xs), strict=True)


class LonghornPass(torch.autograd.Function):
    """(state [B,D,N], q, k [B,T,N], v, delta [B,T,D], starts [B,T]) -> y [B,T,D], the state after the last token."""

    @staticmethod
    def forward(
        ctx, state: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        borders, outs = [], []
        for q_C, *block in blocks(q, k, v, delta, starts):
            borders.append(state)
            S = walk(state, *block)[1]
            outs.append(read(S, q_C))
            state = S[:, -1].clone()
        ctx.save_for_backward(torch.stack(borders), q, k, v, delta, starts)
        return torch.cat(outs, dim=1), state

    @staticmethod
    def backward(ctx, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        borders, *xs = ctx.saved_tensors
        gradients, later = [], grad_state
        for border, block in reversed(list(zip(borders.unbind(0), blocks(grad_y, *xs), strict=True))):
            *grads, later = LonghornPass._backward(border, later, *block)
            gradients.append(grads)
        return later, *(torch.cat(x[::-1], dim=1) for x in zip(*gradients, strict=True)), None

    @staticmethod
    def _backward(border, later, grad_y, q, k, v, delta, starts) -> tuple[Tensor, ...]:
        """The gradients of a block's q, k, v, delta and of the state that enters it; `later`: of the one after it."""
        a, S = walk(border, k, v, delta, starts)
        grad_S = outer(grad_y, q)
        grad_S[:, -1] += later
        towards_past = grad_S.unbind(1)[::-1]
        steps(a.unbind(1)[:0:-1], towards_past[1:], towards_past[0], towards_past[1:])
        grad_q = read(S.transpose(-1, -2), grad_y)
        later = a[:, 0] * grad_S[:, 0]
        grad_a = torch.cat((border.unsqueeze(1), S[:, :-1]), dim=1).mul_(grad_S)
        grad_a = grad_a.mul_(inside(starts, a))
        along_k = read(grad_S, k)
        grad_delta = v * along_k - read(grad_a, k.square())
        grad_k = read(grad_S.transpose(-1, -2), delta * v) - 2 * k * read(grad_a.transpose(-1, -2), delta)
        return grad_q, grad_k, delta * along_k, grad_delta, later


class LonghornSpan(Begun):
    """A span. q, k [B,T,N], v, delta [B,T,D] with delta·‖k‖² < 1, starts [B,T] -> [B,T,D]; `recurrence.Elementwise`.

    The state is [B, D, N].
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, *, starts: Tensor, scale: float | None = None):
        self.dtype, self.starts = v.dtype, starts
        self.q, self.k, self.v, self.delta = (wide(x) for x in (scaled(q, scale), k, v, delta))

    def _run(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return LonghornPass.apply(state, self.q, self.k, self.v, self.delta, self.starts)

    @cached_property
    def _from_zero(self) -> tuple[Tensor, Tensor]:
        return self._run(self.v.new_zeros(*self.v[:, 0].shape, self.k.shape[-1]))

    @cached_property
    def effect(self) -> Effect:
        A = torch.zeros_like(self._from_zero[1])
        for k, delta in blocks(self.k, self.delta):
            A = checkpoint(_forget, A, k, delta, use_reentrant=False, preserve_rng_state=False)
        return Effect(A, self._from_zero[1], (~self.starts.any(1)).to(A.dtype))

    def finish(self, state: Tensor | None) -> Tensor:
        y, _ = self._from_zero if state is None else self._run(state)
        return y.to(self.dtype)


def _forget(A: Tensor, k: Tensor, delta: Tensor) -> Tensor:
    """A plus the log decays of a block, in which Δk² < 1 may have been rounded to 1."""
    forgotten = outer(delta, k.square()).clamp(max=1 - torch.finfo(k.dtype).eps)
    return A + torch.log1p(-forgotten).sum(1)
