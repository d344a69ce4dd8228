"""RWKV-7, Goose (Peng et al. 2025, 2503.14456): a decay a key channel, and what a removal key reads is taken away.

S_t = (diag(w_t) - (a_t ⊙ κ̂_t) κ̂_tᵀ) S_{t-1} + k̃_t v_tᵀ, o_t = S_tᵀ r_t + (r_t·(r_k ⊙ k̃_t)) v_t, with
w = exp(-e^{-½}·σ(w0 + B tanh(A x))), so that no channel forgets more than 0.45 of itself a token, a = σ(a0 + B A x),
κ̂ = (k ⊙ k_k) / ‖k ⊙ k_k‖ of each head, k̃ = k ⊙ (1 + (a - 1) ⊙ k_a).

Values are mixed with those of the first such layer, v + (v_first - v) ⊙ σ(v0 + B A x): the value residual, which is
handed from layer to layer (`models.cross_layer`). What enters each projection is the token mixed with the one before
it. Projections, shares, decays and ranks start as in the authors' code; flash-linear-attention's ranks grow with the
width of a head, too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import Init, constant, declare, positive, uniform
from models.cross_layer import ALONE, Depth
from models.linear import Linear
from models.mixers.heads import head_dim
from models.norm import HeadNorm, checked
from models.precision import wide
from models.recurrence import Dense
from models.sequence import Sequence
from models.token_shift import orthogonal, previous, ramp
from models.width import Units

MIXED = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # what is mixed, and the exponent of its ramp
FASTEST = math.exp(-0.5)  # the largest -log w


def line(start: float, slope: float, zigzag: float = 0.0, *, head: int = 1) -> Init:
    """start + slope·(i / (D - 1) - ½) + zigzag·z|z| [D], z from -1 to 1 over the channels of a head."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        z = 2 * (torch.arange(shape[0]) % head) / max(1, head - 1) - 1
        return start + slope * (torch.linspace(0, 1, shape[0]) - 0.5) + zigzag * z * z.abs()

    return init


def decays(share: float, head: int) -> Init:
    """w0 [D], of a layer at `share` of the depth: slow in the first channels, fast in the last."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        rising = -6 + 6 * torch.linspace(0, 1, shape[0]) ** (1 + share**0.3)
        return rising + line(0.5, 0.0, 2.5, head=head)(shape, generator)

    return init


class LowRank(nn.Module):
    """bias + B activation(A x), or without a bias where `init` is None: [..., D] -> [..., D]. A starts at 0.

    rank: between A and B; None for `scale`·√D rounded to 32s, and at least 32.
    """

    def __init__(self, dim: int, rank: int | None, *, scale: float, activation: nn.Module, init: Init | None):
        super().__init__()
        rank = max(32, round(scale * dim**0.5 / 32) * 32) if rank is None else rank
        self.activation = activation
        self.into = Linear(dim, rank, axes=(None, "embed"), init=constant(0.0))
        self.out = Linear(rank, dim, axes=("heads", None), init=orthogonal(0.1))
        self.bias = None if init is None else declare(dim, axes=("heads",), init=init, decay=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.activation(self.into(x)))
        return y if self.bias is None else wide(y) + wide(self.bias)


class RWKV7(nn.Module):
    """A head's state is a square matrix of dim / heads numbers a side, `dim` the model's.

    heads: number of heads; must divide dim. decay_rank: width through which a token sets its decays. rate_rank: width
    of the rates at which it takes away. value_rank: width of the mixing of values with the first layer's. gate_rank:
    width of the output's gate. Each is null for the authors' choice: a multiple of 32 by the root of dim. norm_eps:
    epsilon that the norm of a head's output adds to its variance; published models have 1e-5 times the width of a head.

    x [B, T, D] -> [B, T, D]. depth: the layer's place in the stack, which the initial values depend on; the model
    gives it.
    """

    hands = "rwkv7 values"

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float = 64e-5,
        depth: Depth = ALONE,
    ):
        super().__init__()
        ranks = {"decay_rank": decay_rank, "rate_rank": rate_rank, "value_rank": value_rank, "gate_rank": gate_rank}
        positive(dim=dim, **{name: 1 if rank is None else rank for name, rank in ranks.items()})
        self.units: Units = {"heads": heads}
        self.head_dim = head = head_dim(dim, heads)
        up, down = depth.layer / max(1, depth.layers - 1), 1 - depth.layer / depth.layers
        self.mixes = nn.ParameterDict(
            {name: declare(dim, axes=("embed",), init=ramp(e * down), decay=False) for name, e in MIXED.items()}
        )
        straight, tanh, sigmoid = nn.Identity(), nn.Tanh(), nn.Sigmoid()
        self.decay = LowRank(dim, decay_rank, scale=2.5, activation=tanh, init=decays(up, head))
        self.rate = LowRank(dim, rate_rank, scale=2.5, activation=straight, init=line(-0.19, 0.4, 0.3, head=head))
        self.gate = LowRank(dim, gate_rank, scale=5.0, activation=sigmoid, init=None)
        # A layer that is the first of its kind, but not of the model, has one and mixes values with themselves.
        self.share = (
            LowRank(dim, value_rank, scale=1.7, activation=straight, init=line(0.73, -0.4)) if depth.layer else None
        )
        self.r = Linear(dim, dim, axes=("heads", "embed"), init=uniform(0.5 * dim**-0.5))
        self.k = Linear(dim, dim, axes=("heads", "embed"), init=uniform(0.05 * dim**-0.5))
        self.v = Linear(dim, dim, axes=("heads", "embed"), init=uniform(0.5 * dim**-0.5))
        self.removal = declare(dim, axes=("heads",), init=line(0.71, -0.1), decay=False)
        self.replacement = declare(dim, axes=("heads",), init=constant(1.02), decay=False)
        self.bonus = declare(dim, axes=("heads",), init=constant(-0.04), decay=False)
        self.norm = HeadNorm(dim, eps=checked(norm_eps), weight=((depth.layer + 1) / depth.layers) ** 0.7, bias=True)
        self.out = Linear(dim, dim, axes=("embed", "heads"), init=constant(0.0))
        self.recurrence = Dense("dplr", scale=1.0)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        return self.handing(x_BTD, seq, None, slot=slot)[0]

    def handing(
        self, x_BTD: Tensor, seq: Sequence, first_BTD: Tensor | None, *, slot: str
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and this layer's values for later ones, where `first_BTD`, the first layer's, is None."""
        delta_BTD = previous(x_BTD, seq, slot=f"{slot}/shift") - x_BTD
        r, w, k, v, a, g = (x_BTD + delta_BTD * self.mixes[name].to(x_BTD.dtype) for name in MIXED)
        v_BTD = self.v(v)
        made_BTD = v_BTD.clone() if first_BTD is None else None  # sharding must not be handed a view
        first_BTD = v_BTD if first_BTD is None else first_BTD
        if self.share is not None:
            v_BTD = v_BTD + (first_BTD - v_BTD) * self.share(v).sigmoid().to(v_BTD.dtype)
        k_BTD, a_BTD = wide(self.k(k)), self.rate(a).sigmoid()
        g_BTHK = self._heads(-FASTEST * self.decay(w).sigmoid())
        away_BTHK = F.normalize(self._heads(k_BTD * wide(self.removal)), dim=-1, eps=1e-12)
        k_BTHK = self._heads(k_BTD * (1 + (a_BTD - 1) * wide(self.replacement)))
        r_BTHK, v_BTHK, a_BTHK = (self._heads(y) for y in (self.r(r), v_BTD, a_BTD))
        o_BTHK = seq.scan(self.recurrence, r_BTHK, k_BTHK, v_BTHK, g_BTHK, -away_BTHK, away_BTHK * a_BTHK, slot=slot)
        weights_HK = self._heads(wide(self.bonus))
        bonus_BTHK = (r_BTHK * k_BTHK * weights_HK).sum(-1, keepdim=True) * v_BTHK
        y_BTD = (self.norm(o_BTHK) + bonus_BTHK.flatten(-2)) * self.gate(g)
        return self.out(y_BTD.to(x_BTD.dtype)), made_BTD

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
