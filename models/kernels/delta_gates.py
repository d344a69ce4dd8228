"""The delta rule with a gate on what it erases and another on what it writes, each by channel (Gated DeltaNet-2,
2605.22791): S ← diag(e^g) S, then S ← S - k (b ⊙ k)ᵀ S + k (w ⊙ v)ᵀ.

The WY form of `models.kernels.delta` with two keys: b ⊙ k reads what is to be taken away, k is where it is written.
With L_ts = Σ_j (b_t k_t)_j k_sj e^{G_tj - G_sj} for s < t, [u | w] = (I + L)⁻¹ [w ⊙ v | (b ⊙ k) e^G].
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.chunk_scan import Replace
from models.kernels.chunking import chunks, scaled, seen_in, unchunks
from models.kernels.decay import chunk_size, decayed
from models.kernels.delta import DeltaSpan, Solve
from models.kernels.tiled_scan import Streamed
from models.precision import wide


def step(
    xs: tuple[Tensor, ...], starts: Tensor, state: Tensor, memo: list[Tensor], *, scale: float | None, size: int
) -> tuple[Tensor, Tensor]:
    """xs: q, k [B,T,H,K], v [B,T,H,V], g, b [B,T,H,K], w [B,T,H,V]. See `stream.Step`."""
    q, k, v, g, erase, write = (chunks(wide(x), size) for x in xs)
    known = decayed(g, k, scaled(q, scale), erase * k, seen=seen_in(starts, size), memo=memo)
    once = torch.ones_like(k[..., 0])
    u, w = Solve.apply(known.scores[1], once, write * v, known.reads[1])  # type: ignore[no-untyped-call]
    u = F.pad(u, (0, state.shape[-1] - u.shape[-1]))  # columns for the effect
    before, written, state = Replace.apply(known.kept, u, w, known.writes, state)  # type: ignore[no-untyped-call]
    return unchunks(known.reads[0] @ before + known.scores[0] @ written, starts.shape[1]), state


class EraseWriteSpan(DeltaSpan):
    """A span of q, k, v, g, b and w; see `recurrence.Dense`."""

    def __init__(self, *xs: Tensor, starts: Tensor, scale: float | None = None):
        size = chunk_size(*xs[1:4])
        Streamed.__init__(self, partial(step, scale=scale, size=size), *xs, starts=starts, chunk=size)
