"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, 2412.06464): decay the state, then replace what the key remembers.

Gates as in flash-linear-attention: g = -e^{A_log}·softplus(W_a x + dt_bias), β = σ(W_b x), both per head, fp32.
"""

from torch import Tensor

from models.axes import declare, log_uniform_rate, softplus_inverse_of_log_uniform
from models.kernels.decay_gate import head_decay, write_strength
from models.linear import Linear
from models.mixers.heads import repeat_heads
from models.mixers.qkv import QKVMixer
from models.norm import GatedRMSNorm, checked, l2_normalise
from models.recurrence import Dense
from models.sequence import Sequence


class GatedDeltaNet(QKVMixer):
    """A value head's state is a matrix of dim * expand_k / heads by dim * expand_v / value_heads numbers, `dim` the
    model's.

    heads: number of heads of queries and keys; must divide dim * expand_k. expand_k: width of the keys of all heads
    together, and of the queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples
    of dim. conv: tokens that the short causal convolution on queries, keys and values sees, the present one included;
    it stays within the document; null for none, and silu alone. value_heads: heads of values, each with gates and a
    state of its own, so many to a head of keys; a multiple of heads that divides dim * expand_v; null for as many as
    heads. negative_eigenvalues: β in (0, 2) instead of (0, 1), so that a write may also turn the sign of the value at
    its key (2411.12537). norm_eps: epsilon that the norm of a head's output adds to its mean square; Qwen3-Next has
    1e-6. conv_bias: true gives the convolution a bias.

    x [B, T, D] -> [B, T, D].
    """

    INHERITS = True
    CLOSING = ("gate", "norm", "out")  # what `close` needs

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
        self.rates = Linear(dim, 2 * self.value_heads, axes=("heads", "embed"), parts=(1, 1))
        self.A_log = declare(self.value_heads, axes=("heads",), init=log_uniform_rate(1e-4, 16.0), decay=False)
        dt = softplus_inverse_of_log_uniform(1e-3, 0.1)
        self.dt_bias = declare(self.value_heads, axes=("heads",), init=dt, decay=False)
        self.gate = Linear(dim, self.values, axes=("heads", "embed"))
        self.norm = GatedRMSNorm(self.value_dim, eps=checked(norm_eps), axis=None)
        self.out = Linear(self.values, dim, axes=("embed", "heads"))
        self.recurrence = Dense("gated_delta_rule")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        return self.close(self.read(x_BTD, seq, slot=slot), x_BTD)

    def read(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        """The reads of each head, before the norm: [B, T, N, V]."""
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD, seq, slot=slot)
        q_BTHK, k_BTHK = l2_normalise(q_BTHK), l2_normalise(k_BTHK)
        q_BTHK, k_BTHK = repeat_heads(q_BTHK, self.shared_by), repeat_heads(k_BTHK, self.shared_by)
        dt_BTH, beta_BTH = self.rates(x_BTD).unflatten(-1, (-1, 2)).unbind(-1)
        g_BTH = head_decay(dt_BTH, self.A_log, self.dt_bias)
        beta_BTH = write_strength(beta_BTH, self.strongest)
        return seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, slot=slot)

    def close(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """The output of what the heads have read: [B, T, D]."""
        return self.output(o_BTHV, self.gate(x_BTD))
