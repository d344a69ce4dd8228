"""LaCT (Zhang et al. 2025, 2505.23884): large-chunk test-time training. The state is a SwiGLU for each head, which
takes one step of Muon a chunk of tokens, to give the chunk's values for its keys, and has its rows' norms restored.

As in the authors' layer, queries, keys and values pass silu, the first two are normalised and rotated; a token says at
what rate it teaches each of the three weights (about 1e-3) and how much of the last step's momentum stays; each head's
output is normalised and scaled. Their layer adds attention in a window, here a layer of its own in a pattern. Unlike
theirs, the grid of chunks begins with the document, and the weights start as full matrices. What is learnt from is
projected in at least fp32, as all that follows is: Newton-Schulz makes small singular values large, and with them what
rounding left there. Over ranks the state goes from one to the next.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import constant, declare, fan_in, positive
from models.kernels import lact
from models.linear import Linear
from models.mixers.heads import head_dim
from models.nonlinear_recurrence import Ran, Serial
from models.norm import RMSNorm, checked, l2_normalise
from models.positions import RoPE, turn
from models.precision import wide
from models.sequence import Sequence
from models.width import Units

ROPE = RoPE()
RATE = -6.9073  # softplus⁻¹(1e-3)


@dataclass(frozen=True)
class Learner(Serial):
    """xs: q, k, v [B, T, H, K], rates [B, T, H, 3], momenta [B, T, H]; shared: the first weights. See
    `models.kernels.lact`."""

    chunk: int = 2048

    rule = "lact"

    def nothing(self, *xs: Tensor) -> Tensor:
        q_BTHK, first = xs[0], self.shared[0]
        return q_BTHK.new_zeros(*q_BTHK.shape[:1], q_BTHK.shape[2], 9 * first[0].numel() + 2)

    def run(self, xs: tuple[Tensor, ...], shared: tuple[Tensor, ...], positions: Tensor, state: Tensor) -> Ran:
        q, k, v, rates, mu = xs
        W0, W1, W2 = shared
        return lact.run(q, k, v, rates, mu, (W0, W1, W2), positions, state, self.chunk)


class LaCT(nn.Module):
    """A head's state is three matrices of dim / heads by expand * dim / heads numbers, `dim` the model's, the momentum
    of each, and the gradient of each over the chunk at hand.

    heads: number of heads; must divide dim. chunk: tokens of a document between two steps of its weights. expand:
    hidden channels of a head's SwiGLU in multiples of its own. norm_eps: epsilon that the norm of a head's output adds
    to its mean square.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(self, *, dim: int, heads: int = 4, chunk: int = 2048, expand: float = 1.0, norm_eps: float = 1e-5):
        super().__init__()
        positive(dim=dim, chunk=chunk)
        self.head_dim = K = head_dim(dim, heads)
        self.units: Units = {"heads": heads}
        hidden = int(K * expand)
        positive(**{"expand * dim / heads": hidden})
        self.qkv = Linear(dim, 3 * dim, axes=("heads", "embed"))
        self.rates = Linear(dim, 4 * heads, axes=("heads", "embed"))
        self.rates_bias = declare(heads, 4, axes=("heads", None), init=constant(0.0), decay=False)
        self.W0 = declare(heads, hidden, K, axes=("heads", None, None), init=fan_in(K))
        self.W1 = declare(heads, K, hidden, axes=("heads", None, None), init=fan_in(hidden))
        self.W2 = declare(heads, hidden, K, axes=("heads", None, None), init=fan_in(K))
        self.scale = Linear(dim, heads, axes=("heads", "embed"))
        self.norm = RMSNorm(K, eps=checked(norm_eps), axis=None)
        self.out = Linear(dim, dim, axes=("embed", "heads"))
        self.recurrence = Learner(chunk=chunk)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        wide_BTD = wide(x_BTD)
        q_BTHK, k_BTHK, v_BTHK = F.silu(self.qkv(wide_BTD)).unflatten(-1, (-1, 3 * self.head_dim)).chunk(3, dim=-1)
        rotation = ROPE.rotation(seq, self.head_dim)
        q_BTHK, k_BTHK = (turn(l2_normalise(x), *rotation) for x in (q_BTHK, k_BTHK))
        raw_BTH4 = self.rates(wide_BTD).unflatten(-1, (-1, 4)) + wide(self.rates_bias)
        rates_BTH3, mu_BTH = F.softplus(raw_BTH4[..., :3] + RATE), raw_BTH4[..., 3].sigmoid()
        learner = replace(self.recurrence, shared=tuple(W.to(q_BTHK.dtype) for W in (self.W0, self.W1, self.W2)))
        o_BTHK = seq.scan(learner, q_BTHK, k_BTHK, v_BTHK, rates_BTH3, mu_BTH, slot=slot)
        scaled_BTHK = self.norm(o_BTHK) * F.silu(wide(self.scale(x_BTD))).unsqueeze(-1)
        return self.out(scaled_BTHK.flatten(-2).to(x_BTD.dtype))
