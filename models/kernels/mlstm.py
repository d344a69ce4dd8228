"""Chunked mLSTM: exponential input gates, kept finite by a running maximum (xLSTM, 2405.04517; eq. numbers as of v2).

C_t = f_t·C_{t-1} + e^{ĩ_t} k_t v_tᵀ and n_t the same with v = 1 overflow at once, so that both are stored divided by
e^{m_t}, m_t = max(log f_t + m_{t-1}, ĩ_t). n is a further column of C: v is given a last column of ones. Within a chunk
row t has its own maximum over the tokens it sees; when the state that enters is known, rows, chunks and state are
brought to a common maximum, and no exponent is ever positive.

m is a unit, not a value: it cancels in q·C / q·n, so it carries no gradient. The output is
h_t = q_t·C_t / (max(|q_t·n_t|, e^{-m_t}) + 1e-6), as in the public xLSTM; the last term makes m visible in the sixth
digit, hence "nothing seen yet" must be the absence of m and never m = 0.

A state is one tensor [B, H, K·(V+1) + 2], so that it travels as any other: C row by row, m, and 1 where m is present.
All zeros is the state of a document that has not begun.

Legend: B spans, T tokens, H heads, N chunks, C tokens a chunk, K key width, V value width.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.chunking import Begun, Effect, fold, scaled, segments, unfold
from models.precision import wide

ABSENT = -1e30  # the maximum of nothing; -inf would give -inf - (-inf) = NaN
EPS = 1e-6


def pack(C_BHKV: Tensor, m_BH: Tensor) -> Tensor:
    """[B, H, K, V+1] and its unit [B, H] -> a state that is present."""
    return torch.cat((C_BHKV.flatten(2), m_BH.unsqueeze(-1), torch.ones_like(m_BH).unsqueeze(-1)), dim=-1)


def unit(state: Tensor) -> Tensor:
    """The m of a state, [B, H], `ABSENT` where it is not present."""
    m, present = state.detach()[..., -2:].unbind(-1)
    return torch.where(present != 0, m, ABSENT)


def add(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two states [B, H, S] in a common unit: the larger of theirs."""
    units = unit(a), unit(b)
    m = torch.maximum(*units)
    C_a, C_b = ((u - m).exp().unsqueeze(-1) * x[..., :-2] for u, x in zip(units, (a, b), strict=True))
    present = (m > ABSENT).to(m.dtype)
    return torch.cat((C_a + C_b, (m * present).unsqueeze(-1), present.unsqueeze(-1)), dim=-1)


def decay(F_BH: Tensor, state: Tensor) -> Tensor:
    """e^F times a state: F moves the unit, and its gradient goes through C."""
    drop = F_BH.detach()
    carried = state[..., :-2] * (F_BH - drop).exp().unsqueeze(-1)
    return torch.cat((carried, state[..., -2:-1] + drop.unsqueeze(-1), state[..., -1:]), dim=-1)


class MLSTMSpan(Begun):
    """A span reduced chunk by chunk. q, k [B,T,H,K], v [B,T,H,V], i (log input gate) and f (log forget gate, ≤ 0)
    [B,T,H], starts [B,T]: `recurrence.Stabilised`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        *,
        starts: Tensor,
        scale: float | None = None,
        size: int = 64,
    ):
        self.T, self.dtype = q.shape[1], v.dtype
        i = F.pad(wide(i), [0, 0, 0, -self.T % size], value=ABSENT)  # a zero here would be a token of weight 1
        q, k, v, i, f = (fold(wide(x), size) for x in (scaled(q, scale), k, F.pad(v, [0, 1], value=1.0), i, f))
        seen = segments(starts, size)
        # Differences of long sums cancel; see delta.py.
        sums = f.double().cumsum(-1)
        weights = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(f.dtype) + i.unsqueeze(-2)
        self.k, self.v, self.weights = k, v, weights.masked_fill(~seen.visible, ABSENT)
        self.q, self.G = q, sums.to(f.dtype).masked_fill(~seen.first, ABSENT)
        left = ((sums[..., -1:] - sums).to(f.dtype) + i).masked_fill(~seen.last, ABSENT)
        self.write_max = left.detach().amax(-1)
        written = k * (left - self.write_max.unsqueeze(-1)).exp().unsqueeze(-1)
        self.writes = written.transpose(-1, -2) @ v
        self.total = sums[..., -1].to(f.dtype)
        self.alive = seen.alive.expand_as(self.total)

    @cached_property
    def _inside(self) -> tuple[Tensor, Tensor]:
        """For each token the largest weight in its chunk, [B,H,N,C], and what it reads there, divided by that, [..,
        V+1]."""
        top = self.weights.detach().amax(-1)
        return top, ((self.q @ self.k.transpose(-1, -2)) * (self.weights - top.unsqueeze(-1)).exp()) @ self.v

    @cached_property
    def _from_zero(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """C [B,H,N,K,V+1] and m [B,H,N] before each chunk, and after the last one, the span entered with nothing."""
        C, m = torch.zeros_like(self.writes[:, :, 0]), torch.full_like(self.write_max[:, :, 0], ABSENT)
        total = self.total.masked_fill(~self.alive, ABSENT)
        before = []
        for log_kept, write, write_max in zip(
            total.unbind(2), self.writes.unbind(2), self.write_max.unbind(2), strict=True
        ):
            before.append((C, m))
            last, m = m, torch.maximum(m + log_kept.detach(), write_max)
            C = _weigh(last - m + log_kept, C) + _weigh(write_max - m, write)
        C_before, m_before = (torch.stack(x, dim=2) for x in zip(*before, strict=True))
        return C_before, m_before, C, m

    @cached_property
    def effect(self) -> Effect:
        _, _, C, m = self._from_zero
        return Effect(self.total.sum(2), pack(C, m), self.alive[:, 0].all(-1).to(C.dtype))

    def ahead(self) -> None:
        self._inside  # noqa: B018

    def _entered(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """C and m before each chunk, the span entered with `state`."""
        C, m, _, _ = self._from_zero
        if state is None:
            return C, m
        through = self.total.cumsum(2) - self.total
        reaches = torch.cat((torch.ones_like(self.alive[..., :1]), self.alive[..., :-1]), -1).cumprod(-1).bool()
        through = through.masked_fill(~reaches, ABSENT) + unit(state).unsqueeze(-1)
        both = torch.maximum(m, through.detach())
        entering = state[..., :-2].unflatten(-1, C.shape[-2:]).unsqueeze(2)
        return _weigh(m - both, C) + _weigh(through - both, entering), both

    def finish(self, state: Tensor | None) -> Tensor:
        C, m = self._entered(state)
        row_max, local = self._inside
        past = self.G + m.unsqueeze(-1)
        top = torch.maximum(row_max, past.detach())
        read = (row_max - top).exp().unsqueeze(-1) * local + (past - top).exp().unsqueeze(-1) * (self.q @ C)
        value, norm = read[..., :-1], read[..., -1]
        h = value / (torch.maximum(norm.abs(), (-top).exp()) + EPS).unsqueeze(-1)
        return unfold(h, self.T).to(self.dtype)


def _weigh(log_weight: Tensor, C: Tensor) -> Tensor:
    return log_weight.exp()[..., None, None] * C
