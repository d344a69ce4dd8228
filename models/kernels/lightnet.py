"""LightNet (You Only Scan Once, 2405.21022): values are averaged over the past with weights of every key channel's own.

S_t = Σ_{s≤t} e^{k_s - z_t} v_sᵀ, z_t = log Σ_{s≤t} e^{k_s}: a softmax over the past in each key channel, and once z is
known, gated linear attention with keys e^{k_t - z_t} and log decays z_{t-1} - z_t. z depends on what entered the span,
so a span that waits for its state has no outputs yet, but its effect: its own z at the end, and S in that unit.

A state is one tensor [B, H, K, V+2], so that it travels as any other: S, z, and 1 where z is present. All zeros is the
state of a document that has not begun, which has no logarithm.

Legend: B spans, T tokens, N chunks, C tokens a chunk, H heads, K key width, V value width.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.chunking import Begun, Effect
from models.kernels.elementwise import ElementwiseSpan, chunked
from models.kernels.gated_linear import GatedLinearSpan
from models.kernels.mlstm import ABSENT
from models.precision import wide


def unpack(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S [..., V], z [...], which is `ABSENT` where nothing has been seen, and whether something has."""
    S, z, present = state.split((state.shape[-1] - 2, 1, 1), dim=-1)
    seen = present.detach().squeeze(-1) != 0
    return S, torch.where(seen, z.squeeze(-1), ABSENT), seen


def pack(S: Tensor, z: Tensor, seen: Tensor) -> Tensor:
    return torch.cat((S, torch.where(seen, z, 0.0).unsqueeze(-1), seen.to(S.dtype).unsqueeze(-1)), dim=-1)


def add(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two states [B, H, K, V+2], in the unit of both together."""
    (S_a, z_a, seen_a), (S_b, z_b, seen_b) = unpack(a), unpack(b)
    z = torch.logaddexp(z_a, z_b)
    return pack((z_a - z).exp().unsqueeze(-1) * S_a + (z_b - z).exp().unsqueeze(-1) * S_b, z, seen_a | seen_b)


class LogSum(torch.autograd.Function):
    """z_t = log Σ e^{k_s} over the tokens s ≤ t of t's document: k [B, T, ...], starts [B, T] -> z like k.

    All chunks step through their tokens side by side, then a loop over chunks joins them; see `kernels.elementwise`.
    The gradient is a linear recurrence towards the past.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, starts: Tensor, size: int) -> Tensor:
        T = k.shape[1]
        x = chunked(F.pad(k, [0, 0] * (k.dim() - 2) + [0, -T % min(size, T)], value=ABSENT), size)
        new = chunked(starts, size).view(*x.shape[:3], *(1,) * (k.dim() - 2))
        z, last = torch.empty_like(x), torch.full_like(x[:, :, 0], ABSENT)
        for c in range(x.shape[2]):
            last = z[:, :, c] = torch.logaddexp(last.masked_fill(new[:, :, c], ABSENT), x[:, :, c])
        alone, entering = new.any(2), torch.full_like(last, ABSENT)
        for n in range(1, x.shape[1]):
            joined = torch.logaddexp(last[:, n - 1], entering[:, n - 1])
            entering[:, n] = torch.where(alone[:, n - 1], last[:, n - 1], joined)
        before = entering.unsqueeze(2).masked_fill(new.cumsum(2) > 0, ABSENT)
        z = torch.logaddexp(z, before).flatten(1, 2)[:, :T]
        ctx.save_for_backward(k, starts, z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        k, starts, z = ctx.saved_tensors
        fall = F.pad(z[:, :-1] - z[:, 1:], [0, 0] * (z.dim() - 2) + [0, 1])
        ends = F.pad(starts[:, 1:], [0, 1])
        later = ElementwiseSpan(
            grad.flip(1), fall.masked_fill(_like(ends, z), 0.0).flip(1), starts=ends.flip(1)
        ).finish(None)
        return later.flip(1) * (k - z).exp(), None, None


class LightNetSpan(Begun):
    """A span. q [B,T,H,K], k [B,T,H,K] (logs of weights), v [B,T,H,V], starts [B,T] bool: `recurrence.Normalised`."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor, scale: float | None = None, size: int = 64):
        self.q, self.k, self.v, self.starts, self.scale = q, wide(k), v, starts, scale
        self.z: Tensor = LogSum.apply(self.k, starts, size)  # type: ignore[no-untyped-call]

    @cached_property
    def effect(self) -> Effect:
        begun, z = self.starts.cumsum(1), self.z[:, -1]
        last = (begun == begun[:, -1:])[..., None, None]
        written = (self.k - z.unsqueeze(1)).masked_fill(~last, -torch.inf).exp()
        S = written.permute(0, 2, 3, 1) @ wide(self.v).transpose(1, 2)
        A = S.new_zeros(*S.shape[:2], 0)
        return Effect(A, pack(S, z, torch.ones_like(z, dtype=torch.bool)), (~self.starts.any(1)).to(S.dtype))

    def finish(self, state: Tensor | None) -> Tensor:
        z, S, entered = self.z, None, torch.zeros_like(self.z[:, :1])
        if state is not None:
            S, z_before, seen = unpack(state)
            past = _like(self.starts.cumsum(1) == 0, z)
            z = torch.where(past, torch.logaddexp(z, z_before.unsqueeze(1)), z)
            entered = torch.where(past[:, :1] & seen.unsqueeze(1), z_before.unsqueeze(1) - z[:, :1], 0.0)
        g = torch.cat((entered, (z[:, :-1] - z[:, 1:]).masked_fill(_like(self.starts[:, 1:], z), 0.0)), dim=1)
        return GatedLinearSpan(self.q, (self.k - z).exp(), self.v, g, starts=self.starts, scale=self.scale).finish(S)


def _like(flags_BT: Tensor, x: Tensor) -> Tensor:
    return flags_BT.view(*flags_BT.shape, *(1,) * (x.dim() - 2))
