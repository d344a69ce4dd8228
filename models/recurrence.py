"""The algebra of linear mixers: affine maps of the state, S_out = A·S_in + U, and how they compose.

A recurrence is declared once. `begin` reduces a span, entered with a zero state, to its effect (A, U, alive) and keeps
what `finish` needs to give the span's outputs once the incoming state is known; `compose` joins the effects of two
consecutive spans; `act` takes a state through a span. Composition is associative and not commutative:

    (A2, U2) after (A1, U1)  =  (A2·A1, A2·U1 + U2)

A transport of effects (`parallel/sequence`) needs nothing else, so it serves every recurrence, and a new recurrence is
sequence-parallel on the day it is written.

`alive` [B] is 1 where no document starts in the span and 0 where one does: compose and act multiply by it, so that a
reset is exact and no log-decay is ever -inf. What A holds is the recurrence's own affair: `Diagonal` keeps a log decay
per key channel (GLA), `Dense` a K×K matrix (delta rules).

Legend: B spans, T tokens, H heads, K key width, V value width. States are [B, H, K, V], in at least fp32.
Algebra: Martin & Cundy 2018 (1709.04057) for the affine scan; the mixers cite their own papers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.kernels import delta, diagonal
from models.kernels.chunk import Effect


class Begun(Protocol):
    """A span whose outputs wait for the incoming state."""

    @property
    def effect(self) -> Effect:
        """What the span does to a state; worked out when first asked for."""
        ...

    def finish(self, state: Tensor | None) -> Tensor:
        """Outputs [B, T, H, V] of the span entered with `state` [B, H, K, V] (None: zero)."""
        ...


class Recurrence(ABC):
    """One kind of A. `begin` belongs to the mixer's kernel, the algebra to the kind."""

    @abstractmethod
    def begin(self, *xs: Tensor, starts: Tensor) -> Begun:
        """Reduces a span. xs are [B, T, ...], starts [B, T] bool."""

    @abstractmethod
    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        """A2·A1 in this kind's representation."""

    @abstractmethod
    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        """A·S."""

    def compose(self, first: Effect, then: Effect) -> Effect:
        U = then.U + _each(then.alive) * self.apply(then.A, first.U)
        return Effect(self.multiply(then.A, first.A), U, first.alive * then.alive)

    def act(self, effect: Effect, state: Tensor | None) -> Tensor:
        if state is None:
            return effect.U
        return effect.U + _each(effect.alive) * self.apply(effect.A, state)


@dataclass(frozen=True)
class Diagonal(Recurrence):
    """S_t = diag(e^{g_t})·S_{t-1} + k_t⊗v_t, o_t = S_tᵀ q_t·K^-½ (gated linear attention, 2312.06635).

    begin(q, k [B,T,H,K], v [B,T,H,V], g [B,T,H,K] natural log, ≤ 0).
    """

    chunk: int = 64

    def begin(self, *xs: Tensor, starts: Tensor) -> Begun:
        q, k, v, g = xs
        return diagonal.Chunks(q, k, v, g, starts=starts, size=self.chunk)

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        return then + first

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return A.exp().unsqueeze(-1) * state


@dataclass(frozen=True)
class Dense(Recurrence):
    """S_t = e^{g_t}(I - β_t k_t k_tᵀ)·S_{t-1} + β_t k_t⊗v_t, o_t = S_tᵀ q_t·K^-½ (gated delta rule, 2412.06464).

    begin(q, k [B,T,H,K] with ‖k‖ = 1, v [B,T,H,V], g [B,T,H] natural log, ≤ 0, beta [B,T,H] in [0, 2]).
    """

    chunk: int = 64

    def begin(self, *xs: Tensor, starts: Tensor) -> Begun:
        q, k, v, g, beta = xs
        return delta.Chunks(q, k, v, g, beta, starts=starts, size=self.chunk)

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        return then @ first

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return A @ state


def _each(alive_B: Tensor) -> Tensor:
    return alive_B[:, None, None, None]
