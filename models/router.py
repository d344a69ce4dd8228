"""Routers: which experts a token goes to, with which weights, and what is remembered of where the step before went.

A token's scores are the softmax of its logits, or the sigmoid of each (DeepSeek-V3, 2412.19437, section 2.1.2). It goes
to the `top_k` experts of largest score plus bias. The bias only chooses: weights are of scores alone, so no gradient
passes through it, and after each step it grows by `bias_rate` for an expert with less than its share of that step's
choices and shrinks for one with more (auxiliary-loss-free balancing, 2408.15664, algorithm 1).

What a step leaves behind, `selection_bias` and `loads`, are buffers: part of every checkpoint, equal on all ranks
because they come from counts summed over all of them, and unchanged from one `settle` to the next, so that every
micro-step of a step, and every layer that runs again for its backward, routes by the same numbers.

Where experts lie in groups, a token chooses among those of its best `top_groups` alone, a group being as good as its
best two experts together (DeepSeek-V3, section 2.1.2).

Legend: B spans, T tokens, D model width, E experts, X choices a token, G groups of experts.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.linear import Linear
from models.precision import wide


class Scores(NamedTuple):
    """Scores of each expert for a token, [B, T, E] each."""

    log: Tensor  # a softmax of it over some experts is their scores divided by their sum, however small they all are
    scores: Tensor
    probabilities: Tensor  # the scores divided by their sum


def softmax(logits: Tensor) -> Scores:
    scores = logits.softmax(-1)
    return Scores(logits, scores, scores)


def sigmoid(logits: Tensor) -> Scores:
    log = F.logsigmoid(logits)
    return Scores(log, log.exp(), log.softmax(-1))


RouterName = Literal["softmax", "sigmoid"]
ROUTERS = {"softmax": softmax, "sigmoid": sigmoid}
BalanceName = Literal["document", "batch", "none"]
BALANCES = get_args(BalanceName)


class Routing(NamedTuple):
    """The choices of a layer's router, and the inputs of its losses."""

    probabilities: Tensor  # [B, T, E], they sum to 1
    choices: Tensor  # [B, T, X] int64
    z: Tensor  # [B, T], logsumexp(logits)², fp32 or better
    frequencies: Tensor | None  # [E], sum X: choices a token as the balance loss sees them; None: of its document
    dropped: Tensor | None = None  # [B, T] int64, choices that found no place; None without a capacity


class Router(Linear):
    """x [B, T, D] -> weights [B, T, X], fp32 or better, and the Routing. Arguments as in `models.MoE`, valid."""

    selection_bias: Tensor | None
    loads: Tensor | None

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int,
        router: str,
        renormalise: bool,
        scale: float,
        balance: str,
        bias_rate: float,
        bias: bool = False,
        expert_groups: int = 1,
        top_groups: int = 1,
    ):
        super().__init__(dim, num_experts, axes=("expert", "embed"), bias=bias)
        self.num_experts, self.top_k, self.scores = num_experts, top_k, ROUTERS[router]
        self.casts = False  # scores are made in fp32
        self.renormalise, self.scale, self.balance, self.bias_rate = renormalise, scale, balance, bias_rate
        self.expert_groups, self.top_groups = expert_groups, top_groups
        self.register_buffer("selection_bias", torch.empty(num_experts) if bias_rate else None)
        self.register_buffer("loads", torch.empty(num_experts) if balance == "batch" else None)
        self.start_buffers()

    def start_buffers(self) -> None:
        """No bias, and equal loads: before the first step, the balance loss over the batch has no gradient."""
        if self.selection_bias is not None:
            self.selection_bias.zero_()
        if self.loads is not None:
            self.loads.fill_(1 / self.num_experts)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:  # type: ignore[override]
        logits_BTE = super().forward(wide(x_BTD))
        log_BTE, scores_BTE, probabilities_BTE = self.scores(logits_BTE)
        ranked_BTE = scores_BTE.detach()
        if self.selection_bias is not None:
            ranked_BTE = ranked_BTE + self.selection_bias
        choices_BTX = self._of_best_groups(ranked_BTE).topk(self.top_k, dim=-1).indices
        if self.renormalise:
            weights_BTX = log_BTE.gather(-1, choices_BTX).softmax(-1)
        else:
            weights_BTX = scores_BTE.gather(-1, choices_BTX)
        frequencies_E = self.loads * self.top_k if self.loads is not None else None
        if self.balance == "none":
            frequencies_E = probabilities_BTE.new_zeros(self.num_experts)
        z_BT = logits_BTE.logsumexp(-1).square()
        weights_BTX = weights_BTX if self.scale == 1.0 else weights_BTX * self.scale
        return weights_BTX, Routing(probabilities_BTE, choices_BTX, z_BT, frequencies_E)

    def _of_best_groups(self, ranked_BTE: Tensor) -> Tensor:
        """The same, -inf for experts outside of the groups whose best two are the best together."""
        if self.expert_groups == 1:
            return ranked_BTE
        grouped_BTGE = ranked_BTE.unflatten(-1, (self.expert_groups, -1))
        best_BTG = grouped_BTGE.topk(2, dim=-1).values.sum(-1)
        chosen_BTG = torch.zeros_like(best_BTG, dtype=torch.bool)
        chosen_BTG.scatter_(-1, best_BTG.topk(self.top_groups, dim=-1).indices, True)
        return grouped_BTGE.masked_fill(~chosen_BTG.unsqueeze(-1), -torch.inf).flatten(-2)

    @torch.no_grad()
    def settle(self, counts_E: Tensor) -> None:
        """Ends a step in which expert e got counts[e] choices, summed over all ranks and micro-steps."""
        total = counts_E.sum()
        if self.selection_bias is not None:
            self.selection_bias += self.bias_rate * (total - self.num_experts * counts_E).sign()
        if self.loads is not None:
            self.loads.copy_(counts_E / total.clamp_min(1))


def within_capacity(choices_BTX: Tensor, num_experts: int, capacity_B: Tensor, counted_BT: Tensor) -> Tensor:
    """[B, T, X] bool: which choices are among the first `capacity` [B] int64 of their expert in their span.

    A token that is not counted has no choice and takes no place.
    Earlier tokens come first, whatever the rank of the choice: whether a token finds a place depends on none after it.
    Filling by rank of choice (GShard, 2006.16668) would let a later token push out an earlier one.
    """
    B, T, X = choices_BTX.shape
    chosen_BTE = torch.zeros(B, T, num_experts, dtype=torch.int64, device=choices_BTX.device)
    place_BTE = (chosen_BTE.scatter_(-1, choices_BTX, 1) * counted_BT.unsqueeze(-1)).cumsum(1)
    return (place_BTE.gather(-1, choices_BTX) <= capacity_B.view(-1, 1, 1)) & counted_BT.unsqueeze(-1)
