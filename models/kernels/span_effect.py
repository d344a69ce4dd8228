"""A span of decays as a whole: what it writes to the state that leaves it, and what its tokens read of the one that
enters it. Each is one product over all its tokens, so neither waits for the outputs (LASP-2, 2502.07563, sends the
first while the outputs inside the span are computed).

With g the log decays, out_t lacks q_t e^{Σ_{s≤t} g_s}·S, and the state gains Σ_t e^{Σ_{s>t} g_s} k_t v_tᵀ. Sums run
from the end that makes them short: a difference of long ones would cancel.

Legend: B spans, T tokens, H heads, K key width, V value width; fp32 or better.
"""

import torch.nn.functional as F
from torch import Tensor

from models.kernels.chunking import Effect
from models.precision import wide


def effect(k: Tensor, v: Tensor, g: Tensor | None, starts: Tensor) -> Effect:
    """k [B,T,H,K], v [B,T,H,V], g [B,T,H] or [B,T,H,K] or None, starts [B,T]: see `recurrence.Identity`, `Scalar` and
    `Diagonal`."""
    k, v = wide(k), wide(v)
    begun = starts.cumsum(1)
    last = (begun == begun[:, -1:]).to(k.dtype)[..., None, None]
    if g is None:
        A, written = k.new_zeros(*k.shape[:1], k.shape[2], 0), k * last
    else:
        g = wide(g)
        after = F.pad(g[:, 1:], [0, 0] * (g.dim() - 2) + [0, 1]).flip(1).cumsum(1).flip(1)
        A, written = g.sum(1), k * _by_key(after, k).exp() * last
    U = written.permute(0, 2, 3, 1) @ v.transpose(1, 2)
    return Effect(A, U, (~starts.any(1)).to(U.dtype))


def past(q: Tensor, g: Tensor | None, starts: Tensor, state: Tensor) -> Tensor:
    """The gain of the outputs [B,T,H,V] when `state` [B,H,K,V] enters. q [B,T,H,K], already scaled."""
    q = wide(q)
    if g is not None:
        q = q * _by_key(wide(g).cumsum(1), q).exp()
    reads = (q.transpose(1, 2) @ wide(state)).transpose(1, 2)
    return reads.masked_fill(starts.cumsum(1)[..., None, None] > 0, 0.0)


def _by_key(sums: Tensor, like: Tensor) -> Tensor:
    return sums if sums.dim() == like.dim() else sums.unsqueeze(-1)
