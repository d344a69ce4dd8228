"""Complex elementwise recurrence h_t = e^{g_t + 2πi·θ_t}·h_{t-1} + u_t (LRU, 2303.06349; GateLoop, 2311.01927).

Angles are in turns, not radians: dropping whole turns is exact in any floating-point format, dropping multiples of 2π
is not, because 2π itself is rounded and each wrap adds its error. Sums of turns are taken in fp64 and wrapped to
[-½, ½]; what is left of them is exact to the last digit of fp32 after a million tokens.

Legend: B spans, T tokens, N chunks, C tokens a chunk, ... the state's own dimensions. A complex number is stored as a
real pair (re, im) in a last dimension of 2, so that it travels and is kept like any other state.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from models.kernels.chunking import Begun, Effect
from models.kernels.elementwise import chunked, run, tiles, total
from models.precision import wide


def wrap(turns: Tensor) -> Tensor:
    """The same angle in [-½, ½] turns. The gradient is that of `turns`."""
    return turns - turns.detach().round()


def rotor(g: Tensor, turns: Tensor) -> Tensor:
    """e^{g + 2πi·turns}, complex; zero where g is -inf."""
    return torch.polar(g.exp(), 2 * math.pi * turns)


class ComplexTile:
    """Some tokens of a span: u [B, T, ..., 2], g and turns [B, T, ...], starts [B, T]."""

    def __init__(self, size: int, u: Tensor, g: Tensor, turns: Tensor, starts: Tensor):
        self.T = u.shape[1]
        self.u = torch.view_as_complex(chunked(wide(u), size).contiguous())
        g, turns = chunked(wide(g), size), chunked(wide(turns), size)
        starts = chunked(starts, size).view(*self.u.shape[:3], *(1,) * (g.dim() - 3))
        self.total = g.sum(2)
        self.turned = wrap(turns.double().sum(2))
        self.a = rotor(g.masked_fill(starts, -torch.inf), wrap(turns))
        whole = rotor(self.total.detach(), self.turned.detach().to(g.dtype))
        self.whole = whole.masked_fill(starts.any(2), 0.0)


class ComplexSpan(Begun):
    """A span. u [B, T, ..., 2] pairs, g and turns [B, T, ...], starts [B, T]; see `recurrence.Complex`.

    The outputs are the states, [B, T, ..., 2] in u's dtype; who reads them with a query does so outside. `scale`
    multiplies nothing.
    """

    def __init__(self, u: Tensor, g: Tensor, turns: Tensor, *, starts: Tensor, scale: float | None = None, size=64):
        self.dtype = u.dtype
        self.tiles = [ComplexTile(size, *parts) for parts in tiles(u, g, turns, starts, size=size)]
        self.alive = (~starts.any(1)).to(wide(g).dtype)

    @cached_property
    def _from_zero(self) -> tuple[Tensor, Tensor]:
        return run(self.tiles, torch.zeros_like(self.tiles[0].u[:, 0, 0]))

    @cached_property
    def effect(self) -> Effect:
        decay = total(self.tiles)
        turned = wrap(torch.stack([tile.turned.sum(1) for tile in self.tiles]).sum(0))
        return Effect(
            torch.stack((decay, turned.to(decay.dtype)), -1), torch.view_as_real(self._from_zero[1]), self.alive
        )

    def finish(self, state: Tensor | None) -> Tensor:
        h, _ = self._from_zero if state is None else run(self.tiles, torch.complex(*state.unbind(-1)))
        return torch.view_as_real(h).to(self.dtype)
