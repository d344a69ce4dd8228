"""Attention residuals: a layer reads a weighted mean of what earlier layers have made, in place of their plain sum
(AttnRes, 2603.15031).

Layers lie in blocks of some. Inside a block the outputs of its parts are added up, as in any residual stream. A part
reads Σ_i α_i · b_i over the embedding b_0, the sums b_1, b_2, … of the blocks before, and that of its own block so far;
α = softmax_i(w · b_i / rms(b_i)), with a vector w of the part's own. w starts at zero: a plain mean. The model's norm
reads a last such mean.

Every token does that by itself, along the depth: no token sees another, and no rank another rank.

An example: two blocks of one layer without a feed-forward, embedding e. The first mixer reads e, and makes a; b_1 = a.
The second reads α_0 · e + α_1 · a and makes c; the norm reads α_0 · e + α_1 · a + α_2 · c with weights of its own.

Legend: S sums of blocks, B spans, T tokens, D model width.
"""

import torch
from torch import Tensor, nn

from models.axes import constant, declare
from models.precision import wide

SUM = "depth."  # of the names of sums that layers hand on (`models.lm.LM.crossing`)
EPS = 1e-6


class DepthAttention(nn.Module):
    """One reading: past [S, B, T, D], the embedding and the sums of the blocks before, and the sum so far [B, T, D] or
    None -> [B, T, D], in their dtype; the weights are computed in at least fp32."""

    def __init__(self, dim: int):
        super().__init__()
        self.query = declare(dim, axes=("embed",), init=constant(0.0), decay=False, matrix=False)

    def forward(self, past_SBTD: Tensor, x_BTD: Tensor | None) -> Tensor:
        logits_SBT = self._logits(past_SBTD)
        if x_BTD is None:
            return torch.einsum("sbt,sbtd->btd", logits_SBT.softmax(0).to(past_SBTD.dtype), past_SBTD)
        weights_SBT = torch.cat((logits_SBT, self._logits(x_BTD[None]))).softmax(0).to(x_BTD.dtype)
        read_BTD = torch.einsum("sbt,sbtd->btd", weights_SBT[:-1], past_SBTD)
        return read_BTD + weights_SBT[-1].unsqueeze(-1) * x_BTD

    def _logits(self, x_SBTD: Tensor) -> Tensor:
        dtype = wide(x_SBTD.new_empty(0)).dtype
        products_SBT = x_SBTD @ self.query.to(x_SBTD.dtype)
        norms_SBT = torch.linalg.vector_norm(x_SBTD, dim=-1, dtype=dtype)
        return products_SBT.to(dtype) * (norms_SBT.square() / x_SBTD.shape[-1] + EPS).rsqrt()
