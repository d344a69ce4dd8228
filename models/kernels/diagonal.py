"""Chunked linear recurrence with a decay per key channel (GLA; Yang et al. 2023, 2312.06635, section 4).

Inside a chunk the score of t on s is Σ_k q_tk k_sk e^{G_tk - G_sk}, G the running sum of the log decays. Factoring it
as (q e^G)(k e^-G)ᵀ overflows once a channel forgets; here every factor is a decay from or to the middle of the block
that holds both tokens, so no exponent is ever positive. Blocks double from one token to the chunk: log2(C) matmuls.
"""

from functools import cached_property

import torch
from torch import Tensor

from models.kernels.chunk import Effect, fold, halves, join, scaled, segments, unfold
from models.precision import wide


class Chunks:
    """A span reduced chunk by chunk. q, k, g [B,T,H,K], v [B,T,H,V], starts [B,T]; see `recurrence.Diagonal`."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, starts: Tensor, scale: float | None = None, size: int = 64
    ):
        self.T, self.dtype = q.shape[1], v.dtype
        q, k, v, g = (fold(wide(x), size) for x in (scaled(q, scale), k, v, g))
        seen = segments(starts, size)
        G = g.cumsum(-2)
        self.total = G[..., -1, :]
        self.local = (scores(q, k, G) * seen.visible.to(v.dtype)) @ v
        self.reads = q * G.exp() * seen.first.unsqueeze(-1)
        writes = k * (self.total.unsqueeze(-2) - G).exp() * seen.last.unsqueeze(-1)
        self.writes = writes.transpose(-1, -2) @ v
        self.alive = seen.alive.to(v.dtype)

    @cached_property
    def _from_zero(self) -> tuple[Tensor, Tensor]:
        """States before each chunk [B,H,N,K,V] and after the last one [B,H,K,V], the span entered with zero."""
        factors = (self.total.exp() * self.alive.unsqueeze(-1)).unsqueeze(-1)
        state = torch.zeros_like(self.writes[:, :, 0])
        before = []
        for factor, write in zip(factors.unbind(2), self.writes.unbind(2), strict=True):
            before.append(state)
            state = factor * state + write
        return torch.stack(before, dim=2), state

    @cached_property
    def effect(self) -> Effect:
        return Effect(self.total.sum(2), self._from_zero[1], self.alive[:, 0].prod(-1))

    def finish(self, state: Tensor | None) -> Tensor:
        before = self._from_zero[0]
        if state is not None:
            decay = (self.total.cumsum(2) - self.total).exp()
            alive = torch.cat((torch.ones_like(self.alive[..., :1]), self.alive[..., :-1]), -1).cumprod(-1)
            before = before + (decay * alive.unsqueeze(-1)).unsqueeze(-1) * state.unsqueeze(2)
        return unfold(self.local + self.reads @ before, self.T).to(self.dtype)


def scores(q: Tensor, k: Tensor, G: Tensor) -> Tensor:
    """Σ_k q_tk k_sk e^{G_tk - G_sk} for s ≤ t, zero above. q, k, G [..., C, K] -> [..., C, C], C a power of two."""
    triangles, h = (q * k).sum(-1)[..., None, None], 1
    while h < q.shape[-2]:
        G_first, G_second = halves(G, h)
        middle = G_first[..., -1:, :]
        reading = halves(q, h)[1] * (G_second - middle).exp()
        written = halves(k, h)[0] * (middle - G_first).exp()
        triangles = join(triangles, reading @ written.transpose(-1, -2))
        h *= 2
    return triangles.squeeze(-3)
