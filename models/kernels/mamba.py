"""Mamba's selective state space (Gu & Dao 2023, 2312.00752): elementwise over D×N, read over N by a query.

S_t = e^{Δ_t ⊗ A}·S_{t-1} + (Δ_t x_t) k_tᵀ, y_t = S_t q_t, with A [D, N] the same for all tokens: the log decays of a
span are A times the sum of its Δ. As in `models.kernels.longhorn`, the states of all tokens exist for one block of them
at a time.

Legend: B spans, T tokens, C tokens a block, D channels, N the state's width.
"""

from functools import cached_property

import torch
from torch import Tensor

from models.kernels.chunking import Begun, Effect, scaled
from models.kernels.elementwise import steps
from models.kernels.longhorn import blocks, inside, outer, read
from models.precision import wide


def walk(state: Tensor, A: Tensor, k: Tensor, v: Tensor, delta: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The decays and the states [B, C, D, N] of a block entered with `state` [B, D, N]."""
    a = (delta.unsqueeze(-1) * A).exp_()
    a = a.mul_(inside(starts, a))
    S = outer(delta * v, k)
    steps(a.unbind(1), S.unbind(1), state, S.unbind(1))
    return a, S


class MambaPass(torch.autograd.Function):
    """(state [B,D,N], A [D,N], q, k [B,T,N], v, delta [B,T,D], starts [B,T]) -> y [B,T,D], the state after the last
    token."""

    @staticmethod
    def forward(
        ctx, state: Tensor, A: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        borders, outs = [], []
        for q_C, *block in blocks(q, k, v, delta, starts):
            borders.append(state)
            S = walk(state, A, *block)[1]
            outs.append(read(S, q_C))
            state = S[:, -1].clone()
        ctx.save_for_backward(torch.stack(borders), A, q, k, v, delta, starts)
        return torch.cat(outs, dim=1), state

    @staticmethod
    def backward(ctx, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        borders, A, *xs = ctx.saved_tensors
        gradients, later, grad_A = [], grad_state, torch.zeros_like(A)
        for border, block in reversed(list(zip(borders.unbind(0), blocks(grad_y, *xs), strict=True))):
            *grads, in_A, later = MambaPass._backward(border, later, A, *block)
            grad_A += in_A
            gradients.append(grads)
        return later, grad_A, *(torch.cat(x[::-1], dim=1) for x in zip(*gradients, strict=True)), None

    @staticmethod
    def _backward(border, later, A, grad_y, q, k, v, delta, starts) -> tuple[Tensor, ...]:
        """The gradients of a block's q, k, v, delta, of A, and of the state that enters the block; `later`: of the one
        after it."""
        a, S = walk(border, A, k, v, delta, starts)
        grad_S = outer(grad_y, q)
        grad_S[:, -1] += later
        towards_past = grad_S.unbind(1)[::-1]
        steps(a.unbind(1)[:0:-1], towards_past[1:], towards_past[0], towards_past[1:])
        grad_q = read(S.transpose(-1, -2), grad_y)
        later = a[:, 0] * grad_S[:, 0]
        grad_log = torch.cat((border.unsqueeze(1), S[:, :-1]), dim=1).mul_(grad_S).mul_(a)
        along_k = read(grad_S, k)
        grad_delta = v * along_k + (grad_log * A).sum(-1)
        grad_k = read(grad_S.transpose(-1, -2), delta * v)
        return grad_q, grad_k, delta * along_k, grad_delta, (grad_log * delta.unsqueeze(-1)).sum((0, 1)), later


class MambaSpan(Begun):
    """A span. q, k [B,T,N], v, delta [B,T,D], A [D,N] ≤ 0, starts [B,T] -> [B,T,D]; `recurrence.Elementwise`, with A
    what all tokens share.

    The state is [B, D, N].
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, A: Tensor, *, starts: Tensor, scale: float | None = None
    ):
        self.dtype, self.starts = v.dtype, starts
        self.q, self.k, self.v, self.delta = (wide(x) for x in (scaled(q, scale), k, v, delta))
        self.A = A.to(self.delta.dtype)

    def _run(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return MambaPass.apply(state, self.A, self.q, self.k, self.v, self.delta, self.starts)

    @cached_property
    def _from_zero(self) -> tuple[Tensor, Tensor]:
        return self._run(self.v.new_zeros(*self.v[:, 0].shape, self.k.shape[-1]))

    @cached_property
    def effect(self) -> Effect:
        U = self._from_zero[1]
        return Effect(self.delta.sum(1).unsqueeze(-1) * self.A, U, (~self.starts.any(1)).to(U.dtype))

    def finish(self, state: Tensor | None) -> Tensor:
        y, _ = self._from_zero if state is None else self._run(state)
        return y.to(self.dtype)
