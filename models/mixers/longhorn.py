"""Longhorn (Liu et al. 2024, 2407.14207): Mamba's block around the recurrence of online least squares.

β = σ(dt), Δ = β / (1 + β‖k‖²), S_t = (1 - Δ k²)·S_{t-1} + Δ x kᵀ, y = S q + D·x. The key itself forgets: there is no A.
"""

from torch import Tensor

from models.axes import constant, declare
from models.linear import Linear
from models.mixers.mamba import MambaBlock
from models.precision import wide
from models.recurrence import Elementwise
from models.sequence import Sequence


class Longhorn(MambaBlock):
    """The state is dim * expand by `state` numbers, `dim` the model's.

    heads: has no meaning here, where every number of the state has a decay of its own; accepted so that any mixer
    can take another's place. expand: inner width in multiples of dim. state: numbers that each inner channel keeps,
    the width of the keys and of the queries. rank: width through which the step sizes of all channels are computed;
    null for dim / 16, rounded up. conv: tokens that the short causal convolution before the recurrence sees, the
    present one included; it stays within the document. conv_bias: true gives it a bias.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int | None = None,
        expand: float = 2.0,
        state: int = 16,
        rank: int | None = None,
        conv: int = 4,
        conv_bias: bool = True,
    ):
        super().__init__(dim=dim, expand=expand, state=state, rank=rank, conv=conv, conv_bias=conv_bias)
        inner, rank = self.inner, self.widths[0]
        self.dkq = Linear(inner, sum(self.widths), axes=(None, "heads"), parts=self.widths)
        self.dt = Linear(rank, inner, axes=("heads", self.inside), bias=True)
        self.D = declare(inner, axes=("heads",), init=constant(1.0), decay=False)
        self.out = Linear(inner, dim, axes=("embed", "heads"))
        self.recurrence = Elementwise("longhorn", scale=1.0)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        v_BTV = self.conv(self.x(x_BTD), seq, slot=slot)
        dt, k_BTN, q_BTN = self.width.sum(self.dkq(v_BTV)).split(self.widths, dim=-1)
        beta_BTV = wide(self.dt(dt)).sigmoid()
        delta_BTV = beta_BTV / (1 + beta_BTV * wide(k_BTN).square().sum(-1, keepdim=True))
        y_BTV = seq.scan(self.recurrence, q_BTN, k_BTN, wide(v_BTV), delta_BTV, slot=slot)
        return self.output(y_BTV, v_BTV, x_BTD)
