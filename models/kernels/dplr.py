"""Chunked recurrence whose A is diagonal plus low rank: S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ (RWKV-7,
2503.14456).

a reads the state before it decays; a e^{-g} reads the same of the decayed one, so that this is a delta rule with a key
to read, another to write back, and a write of its own. What the reads of a chunk find, p, couples them:

    p_t = Σ_{s<t} (a'_t·b_s) p_s + (a'_t·k_s) v_s + a'_t S,  a' = a e^{-g},

with the decays of `models.kernels.decay` in every product: one triangular system, and the chunk writes b pᵀ + k vᵀ,
twice its tokens for `models.kernels.chunk_scan`. Nothing overflows while e^{-g} does not; RWKV-7 forgets at most
e^{-0.61} a token.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import delta
from models.kernels.chunk_scan import Replace
from models.kernels.chunking import chunks, scaled, seen_in, unchunks
from models.kernels.decay import chunk_size, decayed
from models.kernels.tiled_scan import Streamed
from models.precision import wide


def step(
    xs: tuple[Tensor, ...], starts: Tensor, state: Tensor, memo: list[Tensor], *, scale: float | None, size: int
) -> tuple[Tensor, Tensor]:
    """xs: q, k [B,T,H,K], v [B,T,H,V], g, a, b [B,T,H,K]. See `stream.Step`."""
    q, k, v, g, a, b = (chunks(wide(x), size) for x in xs)
    q, a, seen = scaled(q, scale), a * (-g).exp(), seen_in(starts, size)
    of_b, of_k = memo[:2], memo[2:]
    back = decayed(g, b, q, a, seen=seen, memo=of_b)
    new = decayed(g, k, q, a, seen=seen, memo=of_k)
    memo[:] = [*of_b, *of_k]
    right = torch.cat((new.scores[1].tril(-1) @ v, back.reads[1]), -1)
    solved = torch.linalg.solve_triangular(-back.scores[1].tril(-1), right, upper=False, unitriangular=True)
    u, w = solved.split((v.shape[-1], k.shape[-1]), -1)
    before, written, state = Replace.apply(  # type: ignore[no-untyped-call]
        back.kept,
        F.pad(torch.cat((u, v), -2), (0, state.shape[-1] - v.shape[-1])),
        torch.cat((-w, torch.zeros_like(w)), -2),
        torch.cat((back.writes, new.writes), -2),
        state,
    )
    out = back.reads[0] @ before + torch.cat((back.scores[0], new.scores[0]), -1) @ written
    return unchunks(out, starts.shape[1]), state


class DPLRSpan(delta.DeltaSpan):
    """A span of q, k, v, g, a, b; see `recurrence.Dense`."""

    def __init__(self, *xs: Tensor, starts: Tensor, scale: float | None = None):
        size = chunk_size(*xs[1:4])
        Streamed.__init__(self, partial(step, scale=scale, size=size), *xs, starts=starts, chunk=size)
