"""Gated DeltaNet-2 (Hatamizadeh, Choi & Kautz 2026, 2605.22791): a delta rule that erases and writes by separate gates.

S_t = (I - k_t (b_t ⊙ k_t)ᵀ) diag(e^{g_t}) S_{t-1} + k_t (w_t ⊙ v_t)ᵀ: b = σ(W_b x) says by key channel what of the
memory at k is taken away, w = σ(W_w x) by value channel what of v is written. b = w = β, one number a head, is Kimi
Delta Attention, whose decays, norm and gate of the output these are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.axes import declare, log_uniform_rate, softplus_inverse_of_log_uniform
from models.linear import Linear
from models.mixers.heads import repeat_heads
from models.mixers.qkv import QKVMixer
from models.norm import GatedRMSNorm, checked, l2_normalise
from models.precision import wide
from models.recurrence import Dense
from models.sequence import Sequence


class GatedDeltaNet2(QKVMixer):
    """A value head's state is a matrix of dim * expand_k / heads by dim * expand_v / value_heads numbers, `dim` the
    model's.

    heads: number of heads of queries and keys; must divide dim * expand_k. expand_k: width of the keys of all heads
    together, and of the queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples
    of dim. conv: tokens that the short causal convolution on queries, keys and values sees, the present one included;
    it stays within the document; null for none, and silu alone. value_heads: heads of values, each with a gate of what
    is written and a state of its own, so many to a head of keys, which share its decay and its gate of what is erased;
    a multiple of heads that divides dim * expand_v; null for as many as heads. negative_eigenvalues: true lets the gate
    of what is erased reach from 0 to 2 instead of 1 (2411.12537). norm_eps: epsilon that the norm of a head's output
    adds to its mean square. conv_bias: true gives the convolution a bias.

    The decays and the output's gate come through a bottleneck as wide as a head's values.

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
        value_heads: int | None = None,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        conv_bias: bool = False,
    ):
        super().__init__(
            dim=dim,
            heads=heads,
            expand_k=expand_k,
            expand_v=expand_v,
            value_heads=value_heads,
            conv=conv,
            conv_bias=conv_bias,
            silu=True,
        )
        self.strongest = 2.0 if negative_eigenvalues else 1.0
        self.decay_in = Linear(dim, self.value_dim, axes=(None, "embed"))
        self.decay_out = Linear(self.value_dim, self.keys, axes=("heads", None))
        self.A_log = declare(heads, axes=("heads",), init=log_uniform_rate(1.0, 16.0), decay=False)
        self.dt_bias = declare(self.keys, axes=("heads",), init=softplus_inverse_of_log_uniform(1e-3, 0.1), decay=False)
        self.erase = Linear(dim, self.keys, axes=("heads", "embed"))
        self.write = Linear(dim, self.values, axes=("heads", "embed"))
        self.gate_in = Linear(dim, self.value_dim, axes=(None, "embed"))
        self.gate_out = Linear(self.value_dim, self.values, axes=("heads", None), bias=True)
        self.norm = GatedRMSNorm(self.value_dim, activation=torch.sigmoid, eps=checked(norm_eps), axis=None)
        self.out = Linear(self.values, dim, axes=("embed", "heads"))
        self.recurrence = Dense("gdn2")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK, k_BTHK, v_BTNV = self.project(x_BTD, seq, slot=slot)
        dt = F.softplus(wide(self.decay_out(self.decay_in(x_BTD))) + wide(self.dt_bias))
        g_BTHK = -wide(self.A_log).exp().unsqueeze(-1) * dt.unflatten(-1, (-1, self.key_dim))
        b_BTHK = self.strongest * wide(self.erase(x_BTD)).sigmoid().unflatten(-1, (-1, self.key_dim))
        w_BTNV = wide(self.write(x_BTD)).sigmoid().unflatten(-1, (-1, self.value_dim))
        q_BTNK, k_BTNK, g_BTNK, b_BTNK = (
            repeat_heads(x, self.shared_by) for x in (l2_normalise(q_BTHK), l2_normalise(k_BTHK), g_BTHK, b_BTHK)
        )
        o_BTNV = seq.scan(self.recurrence, q_BTNK, k_BTNK, v_BTNV, g_BTNK, b_BTNK, w_BTNV, slot=slot)
        return self.output(o_BTNV, self.gate_out(self.gate_in(x_BTD)))
