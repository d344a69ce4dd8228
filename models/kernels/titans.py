"""Chunked memory with momentum: gradient descent that forgets, one step a token (Titans, 2501.00663).

S_t = η_t S_{t-1} - β_t k_t (k_tᵀ M_{t-1} - v_tᵀ), M_t = α_t M_{t-1} + S_t, o_t = M_tᵀ q_t: affine in M and S together,
with a dense A over the 2K rows of [M; S]. α, η and β are one number a head, so that inside a chunk the coefficients of
what was written are numbers too: with u_t = β_t (v_t - M_{t-1}ᵀ k_t) what token t writes along k_t,

    S_t = Σ_{s≤t} e_ts k_s u_sᵀ + e_t S,    e_ts = Π_{s<r≤t} η_r,
    M_t = Σ_{s≤t} c_ts k_s u_sᵀ + a_t M + b_t S,    c_ts = Σ_{s≤r≤t} Π_{r<j≤t} α_j e_rs,

c a product of two triangles of decays, in which nothing is negative, and M and S what enters the chunk. u follows from
one triangular system, as in the delta rule (`models.kernels.delta`), whose reads are those of the token before.

Legend: B spans, T tokens, N chunks, C tokens a chunk, H heads, K key width, V value width, W columns of the state.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import delta
from models.kernels.chunking import Segments, chunks, scaled, seen_in, unchunks
from models.kernels.decay import chunk_size
from models.kernels.tiled_scan import Streamed
from models.precision import wide


class Known(NamedTuple):
    """The decays of M and S after each token of a chunk, in numbers a head: [N, B, H, C] or [N, B, H, C, C]."""

    memory: Tensor  # a, of the M that enters in M
    momentum: Tensor  # b, of the S that enters in M
    left: Tensor  # e, of the S that enters in S
    write: Tensor  # c, of what each token wrote in M
    moving: Tensor  # e_ts, of the same in S


def known(g: Tensor, mu: Tensor, seen: Segments) -> Known:
    """Computes them from log α and log η [N, B, H, C]."""
    # Differences of long sums cancel; see decay.py.
    sums = [x.double().cumsum(-1) for x in (g, mu)]
    keep, move = (
        (s.unsqueeze(-1) - s.unsqueeze(-2)).to(g.dtype).masked_fill(~seen.visible, -torch.inf).exp() for s in sums
    )
    memory, left = (s.to(g.dtype).exp() * seen.first for s in sums)
    return Known(memory, (keep @ left.unsqueeze(-1)).squeeze(-1), left, keep @ move, move)


def step(
    xs: tuple[Tensor, ...], starts: Tensor, state: Tensor, memo: list[Tensor], *, scale: float | None, size: int
) -> tuple[Tensor, Tensor]:
    """xs: q, k [B,T,H,K], v [B,T,H,V], g, mu, beta [B,T,H]; state [B,H,2K,W]. See `stream.Step`."""
    q, k, v, g, mu, beta = (chunks(wide(x), size) for x in xs)
    q, seen = scaled(q, scale), seen_in(starts, size)
    after = known(g, mu, seen)
    # A token reads what the one before it left: what enters, for a chunk's first. A start reads nothing.
    first = seen.first.to(k.dtype)
    M_before = F.pad(after.memory[..., :-1], (1, 0), value=1.0) * first
    S_before = F.pad(after.momentum[..., :-1], (1, 0)) * first
    write_before = F.pad(after.write[..., :-1, :], (0, 0, 1, 0)) * seen.visible
    entered = torch.cat((M_before.unsqueeze(-1) * k, S_before.unsqueeze(-1) * k), -1)
    u, w = delta.Solve.apply((k @ k.mT) * write_before, beta, v, entered)  # type: ignore[no-untyped-call]
    u = F.pad(u, (0, state.shape[-1] - u.shape[-1]))
    end = Known(*(_at_end(x, starts.shape[1]) for x in after))  # what a start in the chunk cut off is not seen there
    writes = torch.cat([k * x.unsqueeze(-1) for x in (end.write, end.moving)], -1)
    M, S = state.chunk(2, -2)
    before, written = [], []
    for n in range(len(k)):
        entering = torch.cat((M, S), -2)
        before.append(entering)
        written.append(u[n] - w[n] @ entering)
        memory, momentum, left = (x[n, ..., None, None] for x in end[:3])
        new_M, new_S = (writes[n].mT @ written[n]).chunk(2, -2)
        M, S = memory * M + momentum * S + new_M, left * S + new_S
    reads = torch.cat((after.memory.unsqueeze(-1) * q, after.momentum.unsqueeze(-1) * q), -1)
    out = reads @ torch.stack(before) + ((q @ k.mT) * after.write) @ torch.stack(written)
    return unchunks(out, starts.shape[1]), torch.cat((M, S), -2)


def _at_end(x: Tensor, T: int) -> Tensor:
    """[N, B, H, C, ...] -> [N, B, H, ...], at each chunk's last token: what only fills a chunk would move M by S."""
    ends = torch.full((len(x),), x.shape[3] - 1)
    ends[-1] = (T - 1) % x.shape[3]
    return x.movedim(3, 1)[torch.arange(len(x)), ends]


class TitansSpan(delta.DeltaSpan):
    """A span of q, k, v, g, mu and beta; see `recurrence.Dense`. The state is [B, H, 2K, V], M above S."""

    def __init__(self, *xs: Tensor, starts: Tensor, scale: float | None = None):
        size = chunk_size(xs[1], xs[2], None)
        Streamed.__init__(self, partial(step, scale=scale, size=size), *xs, starts=starts, chunk=size)
        self.K *= 2
