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

from models.kernels.chunk import Begun, Effect
from models.kernels.elementwise import Scan, chunked
from models.precision import wide


def wrap(turns: Tensor) -> Tensor:
    """The same angle in [-½, ½] turns. The gradient is that of `turns`."""
    return turns - turns.detach().round()


def rotor(g: Tensor, turns: Tensor) -> Tensor:
    """e^{g + 2πi·turns}, complex; zero where g is -inf."""
    return torch.polar(g.exp(), 2 * math.pi * turns)


class Scanned(Begun):
    """A span. u [B, T, ..., 2] pairs, g and turns [B, T, ...], starts [B, T]; see `recurrence.Complex`.

    The outputs are the states, [B, T, ..., 2] in u's dtype; who reads them with a query does so outside. `scale`
    multiplies nothing.
    """

    def __init__(self, u: Tensor, g: Tensor, turns: Tensor, *, starts: Tensor, scale: float | None = None, size=64):
        self.T, self.dtype = u.shape[1], u.dtype
        self.u = torch.view_as_complex(chunked(wide(u), size).contiguous())
        g, turns = chunked(wide(g), size), chunked(wide(turns), size)
        starts = chunked(starts, size).view(*self.u.shape[:3], *(1,) * (g.dim() - 3))
        self.total = g.sum(2)
        self.turned = wrap(turns.double().sum(2))
        self.a = rotor(g.masked_fill(starts, -torch.inf), wrap(turns))
        whole = rotor(self.total.detach(), self.turned.detach().to(g.dtype))
        self.whole = whole.masked_fill(starts.any(2), 0.0)
        self.alive = (~starts.flatten(1).any(1)).to(g.dtype)

    def _run(self, state: Tensor) -> Tensor:
        return Scan.apply(self.a, self.whole, self.u, state)

    @cached_property
    def _from_zero(self) -> Tensor:
        return self._run(torch.zeros_like(self.u[:, 0, 0]))

    @cached_property
    def effect(self) -> Effect:
        turned = wrap(self.turned.sum(1)).to(self.total.dtype)
        A = torch.stack((self.total.sum(1), turned), dim=-1)
        return Effect(A, torch.view_as_real(self._from_zero[:, -1, -1]), self.alive)

    def finish(self, state: Tensor | None) -> Tensor:
        h = self._from_zero if state is None else self._run(torch.view_as_complex(state.contiguous()))
        return torch.view_as_real(h).flatten(1, 2)[:, : self.T].to(self.dtype)
