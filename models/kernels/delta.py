"""Chunked gated delta rule in its WY form (Yang, Kautz & Hatamizadeh 2024, 2412.06464; the form is 2406.06484's).

Inside a chunk the deletions couple: with L_ts = β_t (k_t·k_s) e^{G_t - G_s} for s < t, the writes are
u - w·S with [u | w] = (I + L)⁻¹ [β v | β k e^G], S the state that enters the chunk. So a chunk acts on the state as
S_out = (e^{G_C} I - k'ᵀ w)·S + k'ᵀ u, k' = k e^{G_C - G}: a dense K×K matrix and an update.
"""

from functools import cached_property

import torch
from torch import Tensor

from models.kernels.chunk import Effect, fold, scaled, segments, unfold, unit_triangular_inverse
from models.kernels.diagonal import scores
from models.precision import wide


class Chunks:
    """A span reduced chunk by chunk. q, k [B,T,H,K], v [B,T,H,V], g [B,T,H] or [B,T,H,K], beta [B,T,H]."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        starts: Tensor,
        scale: float | None = None,
        size: int = 64,
    ):
        self.T, self.dtype = q.shape[1], v.dtype
        q, k, v, g, beta = (fold(wide(x), size) for x in (scaled(q, scale), k, v, g, beta))
        seen = segments(starts, size)
        if g.dim() == k.dim():
            G = g.cumsum(-2)
            total, remaining, visible = G[..., -1, :], G[..., -1:, :] - G, seen.visible.to(v.dtype)
            keys, self.scores = scores(k, k, G) * visible, scores(q, k, G) * visible
        else:
            # Differences of long sums cancel: in fp32 they cost dt_bias and A_log two thirds of their accuracy.
            sums = g.double().cumsum(-1)
            between = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(g.dtype)
            decay = between.masked_fill(~seen.visible, -torch.inf).exp()
            keys, self.scores = (k @ k.transpose(-1, -2)) * decay, (q @ k.transpose(-1, -2)) * decay
            G, total = sums.to(g.dtype).unsqueeze(-1), sums[..., -1:].to(g.dtype)
            remaining = (sums[..., -1:] - sums).to(g.dtype).unsqueeze(-1)
        first, last = seen.first.unsqueeze(-1), seen.last.unsqueeze(-1)
        solve = unit_triangular_inverse(beta.unsqueeze(-1) * keys)
        self.u = solve @ (beta.unsqueeze(-1) * v)
        self.w = solve @ (k * beta.unsqueeze(-1) * G.exp() * first)
        self.reads = q * G.exp() * first
        written = (k * remaining.exp() * last).transpose(-1, -2)
        kept = total.exp() * seen.alive.unsqueeze(-1)
        identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        self.A = kept.unsqueeze(-1) * identity - written @ self.w
        self.U = written @ self.u
        self.alive = seen.alive[:, 0].all(-1).to(v.dtype)

    def _sweep(self, state: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        """States before each chunk and after the last, S ← A·S + U from `state`; any number of columns."""
        before = []
        for A, update in zip(self.A.unbind(2), U.unbind(2), strict=True):
            before.append(state)
            state = A @ state + update
        return torch.stack(before, dim=2), state

    @cached_property
    def _augmented(self) -> tuple[Tensor, Tensor]:
        """One sweep for both halves of the effect: columns [U | A], entered with [0 | I]."""
        K = self.A.shape[-1]
        identity = torch.eye(K, dtype=self.U.dtype, device=self.U.device).expand_as(self.A[:, :, 0])
        entering = torch.cat((torch.zeros_like(self.U[:, :, 0]), identity), dim=-1)
        return self._sweep(entering, torch.cat((self.U, torch.zeros_like(self.A)), dim=-1))

    @cached_property
    def effect(self) -> Effect:
        U, A = self._augmented[1].split((self.U.shape[-1], self.A.shape[-1]), dim=-1)
        return Effect(A, U, self.alive)

    def finish(self, state: Tensor | None) -> Tensor:
        if state is None:
            before = self._sweep(torch.zeros_like(self.U[:, :, 0]), self.U)[0]
        else:
            U, A = self._augmented[0].split((self.U.shape[-1], self.A.shape[-1]), dim=-1)
            before = U + A @ state.unsqueeze(2)
        written = self.u - self.w @ before
        return unfold(self.reads @ before + self.scores @ written, self.T).to(self.dtype)


def ungated(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, starts: Tensor, scale: float | None = None) -> Chunks:
    """The delta rule without a decay (2406.06484)."""
    return Chunks(q, k, v, torch.zeros_like(beta), beta, starts=starts, scale=scale)
