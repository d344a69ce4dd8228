"""Mixture of experts: a softmax router with top-k choices, a shared expert, and a balance loss per document.

The balance loss of a document of n tokens is E·Σ_e f_e P_e, f_e the share of its choices that went to expert e and P_e
its mean router probability (Switch Transformer, 2101.03961, section 2.2; per sequence as in DeepSeek-V3, 2412.19437).
f has no gradient, so the loss is a sum over tokens, Σ_t E·Σ_e f_e p_te: each rank adds its own tokens' part, nothing is
counted twice, and it does not matter how documents were cut into micro-batches, spans or ranks. The counts behind f
are summed once for all layers, so that however deep the model is, its ranks wait for each other once.

Legend: B spans, T tokens, N = B·T, D model width, E experts, X choices a token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import declare, fan_in, positive
from models.dispatch import Dispatch, Here
from models.ffn import SwiGLU
from models.kernels.experts import grouped_linear
from models.linear import Linear
from models.precision import wide
from models.sequence import Sequence


class Routing(NamedTuple):
    """Where a layer sent its tokens."""

    probabilities: Tensor  # [B, T, E]
    choices: Tensor  # [B, T, X] int64


class Experts(nn.Module):
    """E SwiGLU feed-forwards applied to rows grouped by expert."""

    def __init__(self, num_experts: int, dim: int, hidden: int):
        super().__init__()
        self.gate_up = declare(num_experts, dim, 2 * hidden, axes=("expert", "embed", "ffn"), init=fan_in(dim))
        self.down = declare(num_experts, hidden, dim, axes=("expert", "ffn", "embed"), init=fan_in(hidden))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        gate, up = grouped_linear(rows, self.gate_up.to(rows.dtype), offsets).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down.to(rows.dtype), offsets)


class MoE(nn.Module):
    """A mixture of experts: each token's `top_k`, weighted by the router, and a shared one that every token passes.

    A token's router probabilities are renormalised over the experts that it goes to. No expert has a capacity: no
    token is dropped.

    num_experts: experts to choose from, the shared one not counted. top_k: how many of them a token goes to, from 1 to
    num_experts. hidden: inner width of each of them, a SwiGLU (2002.05202). shared_hidden: inner width of the shared
    expert; 0 for none.

    x [B, T, D] -> [B, T, D] and the Routing that the balance loss needs.
    """

    def __init__(self, *, dim: int, num_experts: int, top_k: int, hidden: int, shared_hidden: int = 0):
        super().__init__()
        positive(dim=dim, num_experts=num_experts, hidden=hidden)
        if shared_hidden < 0:
            raise ValueError(f"shared_hidden={shared_hidden}: must not be negative; 0 for no shared expert")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}: must lie between 1 and num_experts={num_experts}")
        self.num_experts, self.top_k = num_experts, top_k
        self.router = Linear(dim, num_experts, axes=("expert", "embed"))
        self.experts = Experts(num_experts, dim, hidden)
        self.shared = SwiGLU(dim=dim, hidden=shared_hidden) if shared_hidden else None
        self.dispatch: Dispatch = Here()

    def forward(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, Routing]:
        probabilities_BTE = self.router(wide(x_BTD)).softmax(-1)
        weights_BTX, choices_BTX = probabilities_BTE.topk(self.top_k, dim=-1)
        weights_BTX = weights_BTX / weights_BTX.sum(-1, keepdim=True)
        sent = self.dispatch.send(x_BTD.flatten(0, 1), choices_BTX.flatten(0, 1), self.num_experts)
        rows = self.experts(sent.rows, sent.offsets)
        y_BTD = self.dispatch.collect(rows, sent, weights_BTX.flatten(0, 1)).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared.transform(x_BTD)
        return y_BTD, Routing(probabilities_BTE, choices_BTX)


def balance(routings: dict[str, Routing], seq: Sequence) -> tuple[Tensor, dict[str, Tensor]]:
    """The balance loss summed over this device's counted tokens, mean over layers (1 a token when balanced), and the
    choices [E] of each expert by layer. One `seq.sum` for all layers."""
    counted = seq.counted.unsqueeze(-1)
    with torch.no_grad():
        chosen = [torch.zeros_like(p).scatter_(-1, c, 1) * counted for p, c in routings.values()]
        per_document = seq.sum(torch.cat([*chosen, counted.to(chosen[0].dtype)], dim=-1))
        frequencies = (per_document / per_document[:, -1:].clamp_min(1))[seq.documents]
        by_layer = frequencies[..., :-1].split([c.shape[-1] for c in chosen], dim=-1)
    losses = [
        p.shape[-1] / c.shape[-1] * (p * f * counted).sum()
        for (p, c), f in zip(routings.values(), by_layer, strict=True)
    ]
    return torch.stack(losses).mean(), {n: c.sum((0, 1)) for n, c in zip(routings, chosen, strict=True)}
