"""RWKV-6, Finch (Peng et al. 2024, 2404.05892): a decay a key channel, and a bonus for the token at hand.

o_t = (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ r_t, S_t = diag(e^{-e^{w_t}}) S_{t-1} + k_t v_tᵀ. A token reads the state before its
own decay and write, which is the state after those of the token before: the recurrence is given k, v and w of the token
before, and is then gated linear attention's. A document's first token has none, and reads the bonus alone.

What enters each projection is the token mixed with the one before it, by a share a channel that the token itself moves
a little (through a low rank). Projections, shares and decays start as in the authors' code, as does the norm of heads,
with its eps of 64e-5; flash-linear-attention starts every decay at e^{-1}.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import Init, constant, declare, positive, uniform
from models.cross_layer import ALONE, Depth
from models.linear import Linear
from models.mixers.heads import head_dim
from models.norm import HeadNorm, checked
from models.precision import wide
from models.recurrence import Diagonal
from models.sequence import Sequence
from models.token_shift import orthogonal, previous, ramp
from models.width import Units

STRONGEST = 10.0  # of w: e^{-e^10} is 0, and e^w overflows not far above


def decays(share: float) -> Init:
    """w0 [D]: decays from 0.9975 a token in the first channel to 0.69 in the last; a layer at `share` of the depth."""
    return lambda shape, generator: -6 + 5 * torch.linspace(0, 1, shape[0]) ** (0.7 + 1.3 * share)


def bonus(share: float) -> Init:
    """u [D]: a falling line, with a zigzag on it."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        zigzag = ((torch.arange(shape[0]) + 1) % 3 - 1) * 0.1
        return share * (1 - torch.linspace(0, 1, shape[0])) + zigzag

    return init


class RWKV6(nn.Module):
    """A head's state is a square matrix of dim / heads numbers a side, `dim` the model's.

    heads: number of heads; must divide dim. mix_rank: width through which a token moves each of the five shares of the
    token before it. decay_rank: width through which a token moves its decays. norm_eps: epsilon that the norm of a
    head's output adds to its variance; published models have 1e-5 times the width of a head.

    x [B, T, D] -> [B, T, D]. depth: the layer's place in the stack, which the initial values depend on; the model
    gives it.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        mix_rank: int = 32,
        decay_rank: int = 64,
        norm_eps: float = 64e-5,
        depth: Depth = ALONE,
    ):
        super().__init__()
        positive(dim=dim, mix_rank=mix_rank, decay_rank=decay_rank)
        self.units: Units = {"heads": heads}
        self.head_dim = head_dim(dim, heads)
        up, down = depth.layer / max(1, depth.layers - 1), 1 - depth.layer / depth.layers
        self.mix = declare(dim, axes=("embed",), init=ramp(down), decay=False)
        starts = {"w": ramp(down), "k": ramp(down), "v": ramp(down, 0.3 * up), "r": ramp(down / 2), "g": ramp(down / 2)}
        self.mixes = nn.ParameterDict(
            {name: declare(dim, axes=("embed",), init=init, decay=False) for name, init in starts.items()}
        )
        self.mix_in = Linear(dim, 5 * mix_rank, axes=(None, "embed"), init=constant(0.0), parts=5 * (mix_rank,))
        self.mix_out = declare(5, mix_rank, dim, axes=(None, None, "embed"), init=uniform(0.01))
        self.decay = declare(dim, axes=("heads",), init=decays(up), decay=False)
        self.decay_in = Linear(dim, decay_rank, axes=(None, "embed"), init=constant(0.0))
        self.decay_out = Linear(decay_rank, dim, axes=("heads", None), init=uniform(0.01))
        self.bonus = declare(dim, axes=("heads",), init=bonus(up), decay=False)
        self.r = Linear(dim, dim, axes=("heads", "embed"), init=orthogonal(1.0))
        self.k = Linear(dim, dim, axes=("heads", "embed"), init=orthogonal(0.1))
        self.v = Linear(dim, dim, axes=("heads", "embed"), init=orthogonal(1.0))
        self.gate = Linear(dim, dim, axes=("heads", "embed"), init=orthogonal(0.1))
        self.norm = HeadNorm(dim, eps=checked(norm_eps), weight=((depth.layer + 1) / depth.layers) ** 0.7, bias=True)
        self.out = Linear(dim, dim, axes=("embed", "heads"), init=constant(0.0))
        self.recurrence = Diagonal("gla", scale=1.0)

    def mixed(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> list[Tensor]:
        """Computes the inputs of w, k, v, r and the gate: x + (μ + W2 tanh(W1 (x + μ_x δ))) δ, δ what the token before
        adds."""
        delta_BTD = previous(x_BTD, seq, slot=slot) - x_BTD
        low = self.mix_in(x_BTD + delta_BTD * self.mix.to(x_BTD.dtype)).tanh().unflatten(-1, (5, -1))
        moved = torch.einsum("btnr,nrd->nbtd", low, self.mix_out.to(x_BTD.dtype))
        shares = zip("wkvrg", moved, strict=True)  # a ParameterDict would sort its names
        return [x_BTD + delta_BTD * (self.mixes[name].to(x_BTD.dtype) + m) for name, m in shares]

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        w, k, v, r, g = self.mixed(x_BTD, seq, slot=f"{slot}/shift")
        k_BTD, v_BTD, w_BTD = self.k(k), self.v(v), self.decay_out(self.decay_in(w).tanh())
        r_BTHK, k_BTHK, v_BTHK = (x.unflatten(-1, (-1, self.head_dim)) for x in (self.r(r), k_BTD, v_BTD))
        before = previous(torch.cat((k_BTD, v_BTD, w_BTD), dim=-1), seq, slot=f"{slot}/written")
        k_before, v_before, w_before = (x.unflatten(-1, (-1, self.head_dim)) for x in before.chunk(3, dim=-1))
        w0_HK = wide(self.decay).unflatten(0, (-1, self.head_dim))
        g_BTHK = -(w0_HK + wide(w_before)).clamp_max(STRONGEST).exp()
        o_BTHK = seq.scan(self.recurrence, r_BTHK, k_before, v_before, g_BTHK, slot=slot)
        u_HK = wide(self.bonus).unflatten(0, (-1, self.head_dim))
        o_BTHK = o_BTHK + (u_HK * r_BTHK * k_BTHK).sum(-1, keepdim=True) * v_BTHK
        return self.out((self.norm(o_BTHK) * F.silu(wide(self.gate(g)))).to(x_BTD.dtype))
