"""Gated DeltaProduct (2502.10297): several steps of the delta rule a token, after one decay and before one read.

S ← e^{g_t} S, then S ← (I - β_tj k_tj k_tjᵀ) S + β_tj k_tj v_tjᵀ for j = 1 … n, o_t = Sᵀ q_t: the gated delta rule over
n times as many tokens, of which the first of each n decays, and may start a document, and the last is read.

Legend: B spans, T tokens, n steps a token, H heads, K key width, V value width.
"""

import torch
from torch import Tensor

from models.kernels.chunking import Begun, Effect
from models.kernels.delta import DeltaSpan


class Product(Begun):
    """A span. q [B,T,H,K], k [B,T,n,H,K], v [B,T,n,H,V], g [B,T,H], beta [B,T,n,H], starts [B,T] bool; see
    `recurrence.Dense`."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, starts: Tensor, scale: float | None = None
    ):
        self.n = k.shape[2]
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
        self.steps = DeltaSpan(
            self._at(q, self.n - 1), k, v, self._at(g, 0), beta, starts=self._at(starts, 0), scale=scale
        )

    def _at(self, x: Tensor, step: int) -> Tensor:
        """[B, T, ...] -> [B, T·n, ...]: x at one step of each token, zeros at the others."""
        zero = torch.zeros_like(x)
        return torch.stack([x if j == step else zero for j in range(self.n)], dim=2).flatten(1, 2)

    @property
    def effect(self) -> Effect:
        return self.steps.effect

    def finish(self, state: Tensor | None) -> Tensor:
        return self.steps.finish(state)[:, self.n - 1 :: self.n]
