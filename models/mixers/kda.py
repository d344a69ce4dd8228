"""Kimi Delta Attention (Kimi Linear, 2510.26692): the gated delta rule with a decay per key channel.

The state decays, S ← diag(e^g) S, before the write erases what its key remembers. Gates as in flash-linear-attention:
g = -e^{A_log}·softplus(W2 W1 x + dt_bias), A_log per head and dt_bias per key channel; β = σ(W_b x) per head. The norm
of the output is gated by a sigmoid.
"""

import torch
from torch import Tensor

from models.axes import declare, log_uniform_rate, softplus_inverse_of_log_uniform
from models.kernels.decay_gate import channel_decay, write_strength
from models.linear import Linear
from models.mixers.inheritance import SoftmaxWeights
from models.mixers.qkv import QKVMixer
from models.norm import GatedRMSNorm, checked, l2_normalise
from models.recurrence import Dense
from models.sequence import Sequence


class KimiDeltaAttention(QKVMixer):
    """A head's state is a matrix of dim * expand_k / heads by dim * expand_v / heads numbers, `dim` the model's.

    heads: number of heads; must divide dim * expand_k and dim * expand_v. expand_k: width of the keys of all heads
    together, and of the queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples
    of dim. conv: tokens that the short causal convolution on queries, keys and values sees, the present one included;
    it stays within the document; null for none, and silu alone. negative_eigenvalues: β in (0, 2) instead of (0, 1), so
    that a write may also turn the sign of the value at its key (2411.12537). conv_bias: true gives the convolution a
    bias. gate_bias: true gives the output's gate one, which the published weights have not. norm_eps: epsilon that the
    norm of a head's output adds to its mean square.

    The decays and the output's gate come through a bottleneck as wide as a head's values.

    x [B, T, D] -> [B, T, D].
    """

    INHERITS = True

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int | None = 4,
        negative_eigenvalues: bool = False,
        conv_bias: bool = False,
        gate_bias: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__(
            dim=dim, heads=heads, expand_k=expand_k, expand_v=expand_v, conv=conv, conv_bias=conv_bias, silu=True
        )
        self.strongest = 2.0 if negative_eigenvalues else 1.0
        self.decay_in = Linear(dim, self.value_dim, axes=(None, "embed"))
        self.decay_out = Linear(self.value_dim, self.keys, axes=("heads", None))
        self.A_log = declare(heads, axes=("heads",), init=log_uniform_rate(1.0, 16.0), decay=False)
        self.dt_bias = declare(self.keys, axes=("heads",), init=softplus_inverse_of_log_uniform(1e-3, 0.1), decay=False)
        self.beta = Linear(dim, heads, axes=("heads", "embed"))
        self.gate_in = Linear(dim, self.value_dim, axes=(None, "embed"))
        self.gate_out = Linear(self.value_dim, self.values, axes=("heads", None), bias=gate_bias)
        self.norm = GatedRMSNorm(self.value_dim, activation=torch.sigmoid, eps=checked(norm_eps), axis=None)
        self.out = Linear(self.values, dim, axes=("embed", "heads"))
        self.recurrence = Dense("kda")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD, seq, slot=slot)
        q_BTHK, k_BTHK = l2_normalise(q_BTHK), l2_normalise(k_BTHK)
        dt_BTHK = self.decay_out(self.decay_in(x_BTD)).unflatten(-1, (-1, self.key_dim))
        g_BTHK = channel_decay(dt_BTHK, self.A_log, self.dt_bias)
        beta_BTH = write_strength(self.beta(x_BTD), self.strongest)
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, slot=slot)
        return self.output(o_BTHV, self.gate_out(self.gate_in(x_BTD)))

    def inherited(self, softmax: SoftmaxWeights) -> dict[str, Tensor]:
        """The gate begins as one half everywhere: a random one would hide what the heads read."""
        return super().inherited(softmax) | {"gate_out.weight": torch.zeros(self.gate_out.weight.shape)}
