"""Titans' neural memory (Behrouz, Zhong & Mirrokni 2024, 2501.00663) as a matrix: learnt while reading, by gradient
descent with momentum and weight decay.

M_t = (1 - α_t)·M_{t-1} + S_t, S_t = η_t·S_{t-1} - θ_t·∇‖M_{t-1}ᵀ k_t - v_t‖², o_t = M_tᵀ q_t (equations 10, 12 and 13
of the paper). The gradient is taken at the token before, a chunk of one token in the paper's terms: so the step is
affine in M and S together, and exact at any split of the sequence. θ lies in (0, ½) and keys have norm 1, which keeps
every step's eigenvalues in the unit disc. Convolution, norm and gate are Gated DeltaNet's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.axes import declare
from models.linear import Linear
from models.mixers.qkv import QKVMixer
from models.norm import GatedRMSNorm, checked, l2_normalise
from models.precision import wide
from models.recurrence import Dense
from models.sequence import Sequence


def slow(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The biases [H, 3] of (α, η, 2θ): about a hundredth is forgotten a token, half of the momentum stays."""
    return torch.tensor([-4.5, 0.0, 0.0]).expand(shape).clone()


class Titans(QKVMixer):
    """A head's state is two matrices of dim * expand_k / heads by dim * expand_v / heads numbers, `dim` the model's:
    its memory, and the momentum of that.

    heads: number of heads; must divide dim * expand_k and dim * expand_v. expand_k: width of the keys of all heads
    together, and of the queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples
    of dim. conv: tokens that the short causal convolution on queries, keys and values sees, the present one included;
    it stays within the document; null for none, and silu alone. conv_bias: true gives the convolution a bias. norm_eps:
    epsilon that the norm of a head's output adds to its mean square.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int | None = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__(
            dim=dim, heads=heads, expand_k=expand_k, expand_v=expand_v, conv=conv, conv_bias=conv_bias, silu=True
        )
        self.rates = Linear(dim, 3 * heads, axes=("heads", "embed"), parts=(1, 1, 1))
        self.rates_bias = declare(heads, 3, axes=("heads", None), init=slow, decay=False)
        self.gate = Linear(dim, self.values, axes=("heads", "embed"))
        self.norm = GatedRMSNorm(self.value_dim, eps=checked(norm_eps), axis=None)
        self.out = Linear(self.values, dim, axes=("embed", "heads"))
        self.recurrence = Dense("titans")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD, seq, slot=slot)
        q_BTHK, k_BTHK = l2_normalise(q_BTHK), l2_normalise(k_BTHK)
        rates_BTH3 = wide(self.rates(x_BTD)).unflatten(-1, (-1, 3)) + wide(self.rates_bias)
        alpha_BTH, eta_BTH, theta_BTH = rates_BTH3.unbind(-1)
        g_BTH, mu_BTH, beta_BTH = F.logsigmoid(-alpha_BTH), F.logsigmoid(eta_BTH), theta_BTH.sigmoid()
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, g_BTH, mu_BTH, beta_BTH, slot=slot)
        return self.output(o_BTHV, self.gate(x_BTD))
