"""DeltaNet (Schlag, Irie & Schmidhuber 2021, 2102.11174; Yang et al. 2024, 2406.06484): each write first erases what
its key remembers, S ← (I - β k kᵀ) S + β k vᵀ, β = σ(W_b x).
"""

from torch import Tensor, nn

from models.axes import positive
from models.conv import short_conv
from models.linear import Linear
from models.mixers.heads import head_dim
from models.norm import GatedRMSNorm, RMSNorm, checked, l2_normalise
from models.precision import wide
from models.recurrence import Dense
from models.sequence import Sequence


class DeltaNet(nn.Module):
    """A head's state is a matrix of dim * expand_k / heads by dim * expand_v / heads numbers, `dim` the model's.

    heads: how many; must divide dim * expand_k and dim * expand_v. expand_k: width of the keys of all heads together,
    and of the queries, in multiples of dim. expand_v: width of the values of all heads together, in multiples of dim.
    conv: tokens that the short causal convolution on queries, keys and values sees, the present one included; it stays
    within the document; null for none, and silu alone. negative_eigenvalues: β in (0, 2) instead of (0, 1), so that a
    write may also turn the sign of what its key remembers (2411.12537). gate: whether the output is multiplied by
    silu(W x) after its norm. conv_bias: whether the convolution has a bias. norm_eps: what the norm of a head's output
    adds to its mean square.

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
        negative_eigenvalues: bool = False,
        gate: bool = False,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        positive(dim=dim)
        keys, values = int(dim * expand_k), int(dim * expand_v)
        self.key_dim = head_dim(keys, heads, what="dim * expand_k")
        self.value_dim = head_dim(values, heads, what="dim * expand_v")
        self.widths = (keys, keys, values)
        self.strongest = 2.0 if negative_eigenvalues else 1.0
        self.qkv = Linear(dim, sum(self.widths), axes=("heads", "embed"), parts=self.widths)
        self.conv = short_conv(sum(self.widths), conv, bias=conv_bias)
        self.beta = Linear(dim, heads, axes=("heads", "embed"))
        self.gate = Linear(dim, values, axes=("heads", "embed")) if gate else None
        norm = GatedRMSNorm if gate else RMSNorm
        self.norm = norm(self.value_dim, eps=checked(norm_eps), axis=None)
        self.out = Linear(values, dim, axes=("embed", "heads"))
        self.recurrence = Dense("delta_rule")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        q, k, v = self.conv(self.qkv(x_BTD), seq, slot=slot).split(self.widths, dim=-1)
        q_BTHK, k_BTHK = (l2_normalise(x.unflatten(-1, (-1, self.key_dim))) for x in (q, k))
        v_BTHV = v.unflatten(-1, (-1, self.value_dim))
        beta_BTH = self.strongest * wide(self.beta(x_BTD)).sigmoid()
        o_BTHV = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHV, beta_BTH, slot=slot)
        gates = () if self.gate is None else (self.gate(x_BTD).unflatten(-1, (-1, self.value_dim)),)
        return self.out(self.norm(o_BTHV, *gates).flatten(-2))
