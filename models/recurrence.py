"""The algebra of linear mixers: affine maps of the state, S_out = A·S_in + U, and how they compose.

A recurrence is declared once. `begin` reduces a span, entered with a zero state, to its effect (A, U, alive) and keeps
what `finish` needs to give the span's outputs once the incoming state is known; `compose` joins the effects of two
consecutive spans; `act` takes a state through a span. Composition is associative and not commutative:

    (A2, U2) after (A1, U1)  =  (A2·A1, A2·U1 + U2)

A transport of effects (`parallel/sequence`) needs nothing else, so it serves every recurrence, and a new recurrence is
sequence-parallel on the day it is written.

An example with one number of state, decay ½ and inputs 1, 2, 3, 4, two tokens a rank. Rank 0 begins: it runs its span
from zero, 1 then 2.5, so U = 2.5, and A = ½·½ = ¼ (as a log, 2·log ½, since products of decays underflow and sums of
their logs do not). Rank 1 begins likewise: 3 then 5.5, U = 5.5, A = ¼. Neither has waited for the other. Now rank 1
receives rank 0's effect, whose `act` on the empty state gives S = 2.5, and finishes: it adds the decayed S to its
outputs from zero, 3 + ½·2.5 = 4.25 and 5.5 + ¼·2.5 = 6.125, which is what one process computes. A third rank would
compose both effects, (¼·¼, ¼·2.5 + 5.5) = (1/16, 6.125), without seeing a token. Were 3 the first token of a document,
rank 1's `alive` would be 0: its outputs stay 3 and 5.5, and the state that leaves it is 5.5, whatever entered.

Composition is not commutative: folding rank 1 before rank 0 gives ¼·5.5 + 2.5. Transports therefore fold in the order
of the chain, and never in that of arrival.

`alive` [B] is 1 where no document starts in the span and 0 where one does: compose and act choose by it, so that a
reset is exact, whatever was there before, and no log-decay is ever -inf; finish uses the incoming state only before the
first start. What A holds is the kind's own affair; which kernel reduces the span is the affair of the rule, by name, of
`models.kernels.registry`.

| kind | A | rules |
|---|---|---|
| Identity | nothing [B, H, 0] | linear |
| Scalar | a log decay per head [B, H] | simple_gla (RetNet, Mamba-2) |
| Diagonal | a log decay per key channel [B, H, K] | gla (GLA, HGRN2) |
| Dense | a matrix [B, H, K, K] | delta_rule, gated_delta_rule, gated_delta_product, kda, gdn2, dplr (RWKV-7), titans |
| Elementwise | a log decay per number of the state | elementwise (RG-LRU, HGRN), longhorn, mamba |
| Complex | a log decay and an angle, in turns, per complex number of the state | complex (LRU) |
| Stabilised | a log decay per head, beside a state that carries its unit | mlstm |
| Normalised | nothing [B, H, 0], beside a state that carries the log of its weights | lightnet |

Legend: B spans, T tokens, H heads, K key width, V value width. States are [B, H, K, V], in at least fp32; those of the
last four kinds are what their kernels say. A state of zeros is the state of a document that has not begun.
Algebra: Martin & Cundy 2018 (1709.04057) for the affine scan; the mixers cite their own papers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.kernels import lightnet, mlstm
from models.kernels.chunking import Begun, Effect
from models.kernels.complex_decay import rotor, wrap
from models.kernels.recurrent import STEPS
from models.kernels.registry import kernel
from models.kernels.token_tiles import Slices, Stretches


@dataclass(frozen=True)
class Recurrence(ABC):
    """One kind of A. `rule` names the kernel that reduces a span; `scale` multiplies q, K^-½ where it is None.

    A span of more than `tile` tokens (None: no limit) is reduced that many at a time: see `models.kernels.token_tiles`.
    `shared`: tensors that are the same for all tokens, which the kernel takes behind the others.
    """

    rule: str
    scale: float | None = None
    tile: int | None = None
    shared: tuple[Tensor, ...] = ()

    splits_decay: ClassVar[bool] = True  # A has that axis too
    stretch: ClassVar[int | None] = None  # tokens that its kernel is given at a time, where it works on all at once
    block_axis: ClassVar[int] = 1  # of a state [B, ...], along which A does not mix: by default heads or channels

    def begin(self, *xs: Tensor, starts: Tensor) -> Begun:
        """Reduces a span. xs are [B, T, ...] as the rule's kernel wants them, starts [B, T] bool."""
        if self.tile is not None and starts.shape[1] > self.tile:
            return Slices(self, xs, starts, self.tile)
        if self.stretch is not None and starts.shape[1] > self.stretch:
            return Stretches(self, xs, starts, self.stretch)
        return kernel(self.rule, *xs)(*xs, *self.shared, starts=starts, scale=self.scale)

    def step(self, *xs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs [B, 1, ...] of one token a row, xs [B, 1, ...], and the state after it; no gradient is known.

        The state that is given may be overwritten. A rule without a step in `models.kernels.recurrent` runs as a span.
        """
        single = STEPS.get(self.rule)
        if single is None or state is None:
            begun = self.begin(*xs, starts=torch.zeros(xs[0].shape[:2], dtype=torch.bool, device=xs[0].device))
            return begun.finish(state), self.act(begun.effect, state)
        out, state = single(*(x[:, 0] for x in xs), *self.shared, state=state, scale=self.scale)
        return out.unsqueeze(1), state

    @abstractmethod
    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        """A2·A1 in this kind's representation."""

    @abstractmethod
    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        """A·S."""

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of two states."""
        return a + b

    def unchanged(self, A: Tensor) -> Tensor:
        """The A of a span that leaves every state as it is, in the shape of another: 0 as log decays and angles are."""
        return torch.zeros_like(A) + 0 * A

    def blocks(self, effect: Effect, count: int) -> list[Effect]:
        """The effect as effects on at most `count` parts of the state, which do not see each other."""
        U = effect.U.tensor_split(min(count, effect.U.shape[self.block_axis]), dim=self.block_axis)
        if not self.splits_decay:
            return [Effect(effect.A, u, effect.alive) for u in U]
        A = effect.A.split([u.shape[self.block_axis] for u in U], dim=self.block_axis)
        return [Effect(a, u, effect.alive) for a, u in zip(A, U, strict=True)]

    def compose(self, first: Effect, then: Effect) -> Effect:
        U = self.add(then.U, _unless(then.alive, self.apply(then.A, first.U)))
        return Effect(self.multiply(then.A, first.A), U, first.alive * then.alive)

    def act(self, effect: Effect, state: Tensor | None) -> Tensor:
        if state is None:
            return effect.U
        return self.add(effect.U, _unless(effect.alive, self.apply(effect.A, state)))


class Identity(Recurrence):
    """S_t = S_{t-1} + U_t: nothing is forgotten (linear attention, 2006.16236)."""

    block_axis = 2
    splits_decay = False

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        return then

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return state


class Scalar(Recurrence):
    """S_t = e^{g_t}·S_{t-1} + U_t, g [B, H] one number a head (RetNet 2307.08621, Mamba-2 2405.21060)."""

    block_axis = 2
    splits_decay = False

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        return then + first

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return A.exp()[..., None, None] * state


class Diagonal(Recurrence):
    """S_t = diag(e^{g_t})·S_{t-1} + U_t, g [B, H, K] (gated linear attention, 2312.06635)."""

    block_axis = 2

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        return then + first

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return A.exp().unsqueeze(-1) * state


class Dense(Recurrence):
    """S_t = A_t·S_{t-1} + U_t, A [B, H, K, K] (delta rules, 2406.06484, 2412.06464)."""

    block_axis = 3
    splits_decay = False

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        return then @ first

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return A @ state

    def unchanged(self, A: Tensor) -> Tensor:
        return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) + 0 * A


class Elementwise(Recurrence):
    """S_t = e^{g_t} ⊙ S_{t-1} + U_t, g in the state's own shape, [B, D] or [B, D, N] (Griffin, 2402.19427)."""

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        return then + first

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return A.exp() * state


class Complex(Recurrence):
    """S_t = e^{g_t + 2πi·θ_t} ⊙ S_{t-1} + U_t: A [B, ..., 2] is (g, θ in turns), the state [B, ..., 2] (re, im) (LRU,
    2303.06349)."""

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        g, turns = (then + first).unbind(-1)
        return torch.stack((g, wrap(turns)), dim=-1)

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        # No view of the state as complex: what comes from a message may begin at an odd number of it.
        return torch.view_as_real(rotor(*A.unbind(-1)) * torch.complex(*state.unbind(-1)))


class Stabilised(Recurrence):
    """S_t = e^{f_t}·S_{t-1} + e^{i_t} k_t v_tᵀ over e^{m_t}, see `models.kernels.mlstm` (mLSTM, 2405.04517)."""

    stretch = 4096

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        return then + first

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return mlstm.decay(A, state)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return mlstm.add(a, b)


class Normalised(Recurrence):
    """S_t = Σ_s e^{k_s - z_t} v_sᵀ, z_t = log Σ_s e^{k_s} [B, H, K], see `models.kernels.lightnet` (LightNet,
    2405.21022)."""

    block_axis = 2
    splits_decay = False

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        return then

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return state

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return lightnet.add(a, b)


def _unless(alive_B: Tensor, state: Tensor) -> Tensor:
    """The state, zeros where a document starts: no product, which what is not finite would survive."""
    return state.masked_fill(_each(alive_B, state) == 0, 0.0)


def _each(alive_B: Tensor, state: Tensor) -> Tensor:
    return alive_B.view(-1, *(1,) * (state.dim() - 1))
