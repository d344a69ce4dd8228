"""Chunked delta rules in their WY form (2406.06484; gated, 2412.06464; gated by channel, 2510.26692).

Inside a chunk the deletions couple: with L_ts = β_t Σ_k k_tk k_sk e^{G_tk - G_sk} for s < t, the writes are u - w·S,
[u | w] = (I + L)⁻¹ [β v | β k e^G], S the state that enters the chunk. All decays, G, are of `models.kernels.decay`.
"""

from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.chunk_scan import Replace
from models.kernels.chunking import Effect, chunks, scaled, seen_in, unchunks
from models.kernels.decay import chunk_size, decayed
from models.kernels.tiled_scan import Streamed
from models.precision import wide


class Solve(torch.autograd.Function):
    """u = (I + L)⁻¹ β v and w = (I + L)⁻¹ β k, L what lies below the diagonal of β·scores [..., C, C]; β [..., C]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, beta: Tensor, v: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        beta = beta.unsqueeze(-1)
        # Forward substitution; the Neumann doubling often used instead loses every digit when keys repeat.
        identity = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device).expand_as(scores)
        inverse = torch.linalg.solve_triangular(scores * beta, identity, upper=False, unitriangular=True)
        u, w = inverse @ (beta * v), inverse @ (beta * k)
        ctx.save_for_backward(scores, beta, v, k, inverse, u, w)
        return u, w

    @staticmethod
    def backward(ctx: Any, d_u: Tensor, d_w: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        scores, beta, v, k, inverse, u, w = ctx.saved_tensors
        d_v, d_k = inverse.mT @ d_u, inverse.mT @ d_w
        d_lower = (d_v @ u.mT).add_(d_k @ w.mT).neg_().tril_(-1)
        d_beta = (d_lower * scores).sum(-1) + (d_v * v).sum(-1) + (d_k * k).sum(-1)
        return d_lower.mul_(beta), d_beta, d_v.mul_(beta), d_k.mul_(beta)


def step(
    xs: tuple[Tensor, ...], starts: Tensor, state: Tensor, memo: list[Tensor], *, scale: float | None, size: int
) -> tuple[Tensor, Tensor]:
    """xs: q, k [B,T,H,K], v [B,T,H,V], g [B,T,H] or [B,T,H,K] or absent, beta [B,T,H]. See `stream.Step`."""
    q, k, v, *gates, beta = (chunks(wide(x), size) for x in xs)
    known = decayed(gates[0] if gates else None, k, scaled(q, scale), k, seen=seen_in(starts, size), memo=memo)
    u, w = Solve.apply(known.scores[1], beta, v, known.reads[1])  # type: ignore[no-untyped-call]
    if more := state.shape[-1] - u.shape[-1]:  # columns for the effect
        u = F.pad(u, (0, more))
    before, written, state = Replace.apply(known.kept, u, w, known.writes, state)  # type: ignore[no-untyped-call]
    return unchunks(known.reads[0] @ before + known.scores[0] @ written, starts.shape[1]), state


class DeltaSpan(Streamed):
    """A span of q, k, v, perhaps g, and beta; see `recurrence.Dense`.

    One that waits for its state is streamed once too. The state is given K columns more, which start as the identity:
    they turn into A, and the outputs of these columns into what the state is to be multiplied by.
    """

    def __init__(self, *xs: Tensor, starts: Tensor, scale: float | None = None):
        size = chunk_size(xs[1], xs[2], xs[3] if len(xs) > 4 else None)
        super().__init__(partial(step, scale=scale, size=size), *xs, starts=starts, chunk=size)

    @cached_property
    def effect(self) -> Effect:
        zero = self._zero()
        identity = torch.eye(self.K, dtype=zero.dtype, device=zero.device).expand(*zero.shape[:2], -1, -1)
        self._open = self._run(torch.cat((zero, identity), -1))
        U, A = self._open[1].split((self.V, self.K), -1)
        return Effect(A, U, (~self.starts.any(1)).to(U.dtype))

    def _past(self, state: Tensor) -> Tensor:
        assert self._open is not None
        reads = (self._open[0][..., self.V :].transpose(1, 2) @ state).transpose(1, 2)
        return reads.masked_fill(self.starts.cumsum(1)[..., None, None] > 0, 0.0)
