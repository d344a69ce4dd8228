"""DeltaNet (Schlag, Irie & Schmidhuber 2021, 2102.11174; Yang et al. 2024, 2406.06484): each write first erases what
its key remembers, S ← (I - β k kᵀ) S + β k vᵀ, β = σ(W_b x).
"""

from torch import Tensor

from models.kernels.decay_gate import write_strength
from models.linear import Linear
from models.mixers.qkv import QKVMixer
from models.norm import GatedRMSNorm, RMSNorm, checked, l2_normalise
from models.recurrence import Dense
from models.sequence import Sequence


class DeltaNet(QKVMixer):
    """A head's state is a matrix of dim * expand_k / heads by dim * expand_v / heads numbers, `dim` the model's.

    heads: number of heads; must divide dim * expand_k and dim * expand_v. expand_k: width of the keys of all heads
    together, and of the queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples
    of dim. conv: tokens that the short causal convolution on queries, keys and values sees, the present one included;
    it stays within the document; null for none, and silu alone. negative_eigenvalues: β in (0, 2) instead of (0, 1), so
    that a write may also turn the sign of the value at its key (2411.12537). gate: true multiplies the output by silu(W
    x) after its norm. conv_bias: true gives the convolution a bias. norm_eps: epsilon that the norm of a head's output
    adds to its mean square.

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
        gate: bool = False,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__(
            dim=dim, heads=heads, expand_k=expand_k, expand_v=expand_v, conv=conv, conv_bias=conv_bias, silu=True
        )
        self.strongest = 2.0 if negative_eigenvalues else 1.0
        self.beta = Linear(dim, heads, axes=("heads", "embed"))
        self.gate = Linear(dim, self.values, axes=("heads", "embed")) if gate else None
        norm = GatedRMSNorm if gate else RMSNorm
        self.norm = norm(self.value_dim, eps=checked(norm_eps), axis=None)
        self.out = Linear(self.values, dim, axes=("embed", "heads"))
        self.recurrence = Dense("delta_rule")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD, seq, slot=slot)
        q_BTHK, k_BTHK = l2_normalise(q_BTHK), l2_normalise(k_BTHK)
        beta_BTH = write_strength(self.beta(x_BTD), self.strongest)
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, beta_BTH, slot=slot)
        return self.output(o_BTHV, None if self.gate is None else self.gate(x_BTD))
