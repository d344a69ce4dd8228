"""Lightning attention (MiniMax-01, 2501.08313, section 2.2; Lightning Attention-2, 2401.04658): linear attention whose
heads forget at fixed rates, faster in lower layers than in upper ones.

S_t = e^{-s}·S_{t-1} + k_t v_tᵀ, o = Sᵀ q, with q, k, v = silu(W x) and no scale; RMSNorm over all heads, then a gate
σ(W_g x). flash-linear-attention has the operator only: the layer is MiniMax's, as in `transformers`. The two
published sets of rates have nothing in common, hence the option `rates`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import positive
from models.cross_layer import ALONE, Depth
from models.linear import Linear
from models.mixers.heads import head_dim
from models.norm import RMSNorm, checked
from models.precision import wide
from models.recurrence import Scalar
from models.sequence import Sequence
from models.width import UNDIVIDED, Units, Width


def minimax(h: Tensor, heads: int, depth: Depth) -> Tensor:
    """ALiBi's slopes 2^(-8(h+1)/H) [H], less by depth: the last layer hardly forgets."""
    share = 1 - depth.layer / (depth.layers - 1 + 1e-5) + 1e-5
    return 2 ** (-8 * (h + 1) / heads) * share


def transnormer(h: Tensor, heads: int, depth: Depth) -> Tensor:
    """8h/H·(1 - l/L) [H] (TransNormerLLM, 2307.14995): the first head never forgets."""
    return 8 * h / heads * (1 - depth.layer / depth.layers)


RateRule = Literal["minimax", "transnormer"]
RATES = {"minimax": minimax, "transnormer": transnormer}


class Lightning(nn.Module):
    """A head's state is a square matrix of dim / heads numbers a side, `dim` the model's.

    heads: number of heads; must divide dim. rates: the rule for a head's decay a token, by its index and the layer's:
    minimax for MiniMax-01's, each head less than the one before, or transnormer for TransNormerLLM's, each more.
    norm_eps: epsilon that the norm of the output adds to its mean square.

    x [B, T, D] -> [B, T, D]. depth: the layer's place in the stack; the model gives it.
    """

    def __init__(
        self, *, dim: int, heads: int, rates: RateRule = "minimax", norm_eps: float = 1e-5, depth: Depth = ALONE
    ):
        super().__init__()
        positive(dim=dim)
        if rates not in RATES:
            raise ValueError(f"rates={rates}: must be one of {', '.join(RATES)}")
        self.units: Units = {"heads": heads}
        self.head_dim = head_dim(dim, heads)
        self.rates, self.depth, self.heads = RATES[rates], depth, heads
        self.width: Width = UNDIVIDED
        self.qkv = Linear(dim, 3 * dim, axes=("heads", "embed"), parts=3 * (self.head_dim,))
        self.gate = Linear(dim, dim, axes=("heads", "embed"))
        self.norm = RMSNorm(dim, eps=checked(norm_eps), axis="heads")
        self.out = Linear(dim, dim, axes=("embed", "heads"))
        self.recurrence = Scalar("simple_gla", scale=1.0)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        # A head's queries, keys and values lie side by side, as in MiniMax's weights.
        q_BTHK, k_BTHK, v_BTHK = F.silu(self.qkv(x_BTD)).unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)
        g_BTH = self.log_decays(v_BTHK).expand(v_BTHK.shape[:3])
        o_BTD = seq.scan(self.recurrence, q_BTHK, k_BTHK, v_BTHK, g_BTH, slot=slot).flatten(-2)
        return self.out(self.norm(o_BTD) * self.gate(x_BTD).sigmoid())

    def log_decays(self, like_BTHV: Tensor) -> Tensor:
        """[H], worked out in fp64."""
        begin, end = self.width.span(self.heads)
        h = torch.arange(begin, end, device=like_BTHV.device, dtype=torch.float64)
        return -self.rates(h, self.heads, self.depth).to(wide(like_BTHV[:0]).dtype)
