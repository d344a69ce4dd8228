"""Gated DeltaProduct (Siems et al. 2025, 2502.10297): Gated DeltaNet with several delta steps a token.

A token decays the state once, then erases and writes with each of its keys in turn: its A is e^g times a product of
generalised Householder matrices, which can turn the state where one of them can only mirror it. Gates, convolution and
norm are Gated DeltaNet's; two steps and β in (0, 2) are the defaults of flash-linear-attention's layer.
"""

import torch.nn.functional as F
from torch import Tensor

from models.axes import declare, log_uniform_rate, positive, softplus_inverse_of_log_uniform
from models.linear import Linear
from models.mixers.qkv import QKVMixer
from models.norm import GatedRMSNorm, checked, l2_normalise
from models.precision import wide
from models.recurrence import Dense
from models.sequence import Sequence

MOST_STEPS = 64  # of a token: each has projections of its own


class GatedDeltaProduct(QKVMixer):
    """A head's state is a matrix of dim * expand_k / heads by dim * expand_v / heads numbers, `dim` the model's.

    heads: number of heads; must divide dim * expand_k and dim * expand_v. steps: times that a token erases and writes,
    each time with a key, a value and a β of its own. expand_k: width of the keys of all heads together, and of the
    queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples of dim. conv: tokens
    that the short causal convolution on queries, keys and values sees, the present one included; it stays within the
    document; null for none, and silu alone. negative_eigenvalues: β in (0, 2) instead of (0, 1), so that a step may
    also turn the sign of the value at its key (2411.12537). conv_bias: true gives the convolution a bias. norm_eps:
    epsilon that the norm of a head's output adds to its mean square.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        steps: int = 2,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int | None = 4,
        negative_eigenvalues: bool = True,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
    ):
        positive(dim=dim, steps=steps)
        if steps > MOST_STEPS:
            raise ValueError(f"steps={steps}: must be at most {MOST_STEPS}")
        super().__init__(
            dim=dim,
            heads=heads,
            expand_k=expand_k,
            expand_v=expand_v,
            writes=steps,
            conv=conv,
            conv_bias=conv_bias,
            silu=True,
        )
        self.steps, self.strongest = steps, 2.0 if negative_eigenvalues else 1.0
        self.dt = Linear(dim, heads, axes=("heads", "embed"))
        self.beta = Linear(dim, steps * heads, axes=("heads", "embed"), parts=steps * (heads,))
        self.A_log = declare(heads, axes=("heads",), init=log_uniform_rate(1e-4, 16.0), decay=False)
        dt = softplus_inverse_of_log_uniform(1e-3, 0.1)
        self.dt_bias = declare(heads, axes=("heads",), init=dt, decay=False)
        self.gate = Linear(dim, self.values, axes=("heads", "embed"))
        self.norm = GatedRMSNorm(self.value_dim, eps=checked(norm_eps), axis=None)
        self.out = Linear(self.values, dim, axes=("embed", "heads"))
        self.recurrence = Dense("gated_delta_product")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK, k, v = self.project(x_BTD, seq, slot=slot)
        k_BTnHK, v_BTnHV = (x.unflatten(2, (self.steps, -1)) for x in (k, v))
        q_BTHK, k_BTnHK = l2_normalise(q_BTHK), l2_normalise(k_BTnHK)
        g_BTH = -wide(self.A_log).exp() * F.softplus(wide(self.dt(x_BTD)) + wide(self.dt_bias))
        beta_BTnH = self.strongest * wide(self.beta(x_BTD)).sigmoid().unflatten(-1, (self.steps, -1))
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTnHK, v_BTnHV, g_BTH, beta_BTnH, slot=slot)
        return self.output(o_BTHV, self.gate(x_BTD))
