"""Chunked linear recurrence, its state decayed by nothing, by a number a head or by one a key channel.

Linear attention (2006.16236), RetNet (2307.08621) and Mamba-2 (2405.21060), gated linear attention (2312.06635,
section 4). A chunk adds writesᵀ·v to what it keeps of the state that enters it, and its outputs are scores·v + reads·S.
"""

from functools import cached_property, partial

import torch
from torch import Tensor

from models.kernels import span_effect
from models.kernels.chunk_scan import Add
from models.kernels.chunking import Effect, chunks, scaled, seen_in, unchunks
from models.kernels.decay import chunk_size, decayed
from models.kernels.tiled_scan import Streamed
from models.precision import wide


def step(
    xs: tuple[Tensor, ...], starts: Tensor, state: Tensor, memo: list[Tensor], *, scale: float | None, size: int
) -> tuple[Tensor, Tensor]:
    """xs: q, k [B,T,H,K], v [B,T,H,V] and, if the state decays, g [B,T,H] or [B,T,H,K]. See `stream.Step`."""
    q, k, v, *gates = (chunks(wide(x), size) for x in xs)
    known = decayed(gates[0] if gates else None, k, scaled(q, scale), seen=seen_in(starts, size), memo=memo)
    update = known.writes.mT @ v
    before, state = Add.apply(known.kept, update, state)  # type: ignore[no-untyped-call]
    inside = known.scores[0] @ v
    out = torch.baddbmm(inside.flatten(0, 2), known.reads[0].flatten(0, 2), before.flatten(0, 2)).view_as(inside)
    return unchunks(out, starts.shape[1]), state


class GatedLinearSpan(Streamed):
    """A span of q, k, v and perhaps g; see `recurrence.Identity`, `Scalar` and `Diagonal`. Its effect is on its way
    before any output is computed."""

    def __init__(self, *xs: Tensor, starts: Tensor, scale: float | None = None):
        self.g, self.scale = (xs[3] if len(xs) > 3 else None), scale
        size = chunk_size(xs[1], xs[2], self.g)
        super().__init__(partial(step, scale=scale, size=size), *xs, starts=starts, chunk=size)

    @cached_property
    def effect(self) -> Effect:
        return span_effect.effect(self.xs[1], self.xs[2], self.g, self.starts)

    def ahead(self) -> None:
        self._open = self._run(self._zero())

    def _past(self, state: Tensor) -> Tensor:
        return span_effect.past(scaled(wide(self.xs[0]), self.scale), self.g, self.starts, state)
