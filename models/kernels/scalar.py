"""Chunked linear recurrence with a decay per head, or none (RetNet 2307.08621, Mamba-2 2405.21060, 2006.16236).

The score of t on s inside a chunk is (q_t·k_s) e^{G_t - G_s}, G the running sum of the log decays: one [C, C] mask.
"""

from functools import cached_property

import torch
from torch import Tensor

from models.kernels.chunk import Effect, fold, scaled, segments, unfold
from models.precision import wide


class Chunks:
    """A span reduced chunk by chunk. q, k [B,T,H,K], v [B,T,H,V], g [B,T,H] or None; see `recurrence.Scalar`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        *,
        starts: Tensor,
        scale: float | None = None,
        size: int = 64,
    ):
        self.T, self.dtype, self.forgets = q.shape[1], v.dtype, g is not None
        g = torch.zeros_like(q[..., 0]) if g is None else g
        q, k, v, g = (fold(wide(x), size) for x in (scaled(q, scale), k, v, g))
        seen = segments(starts, size)
        # Differences of long sums cancel: they are taken in fp64, as in the delta rule.
        sums = g.double().cumsum(-1)
        self.total = sums[..., -1].to(g.dtype)
        between = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(g.dtype)
        remaining = (sums[..., -1:] - sums).to(g.dtype)
        decay = between.masked_fill(~seen.visible, -torch.inf).exp()
        self.local = ((q @ k.transpose(-1, -2)) * decay) @ v
        self.reads = q * (sums.to(g.dtype).exp() * seen.first).unsqueeze(-1)
        self.writes = (k * (remaining.exp() * seen.last).unsqueeze(-1)).transpose(-1, -2) @ v
        self.alive = seen.alive.to(v.dtype)

    def _sweep(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """States before each chunk [B,H,N,K,V] and after the last one [B,H,K,V]."""
        factors = (self.total.exp() * self.alive)[..., None, None]
        before = []
        for factor, write in zip(factors.unbind(2), self.writes.unbind(2), strict=True):
            before.append(state)
            state = factor * state + write
        return torch.stack(before, dim=2), state

    @cached_property
    def effect(self) -> Effect:
        U = self._sweep(torch.zeros_like(self.writes[:, :, 0]))[1]
        A = self.total.sum(2) if self.forgets else U.new_zeros(*U.shape[:2], 0)
        return Effect(A, U, self.alive[:, 0].prod(-1))

    def finish(self, state: Tensor | None) -> Tensor:
        state = torch.zeros_like(self.writes[:, :, 0]) if state is None else state
        return unfold(self.local + self.reads @ self._sweep(state)[0], self.T).to(self.dtype)
