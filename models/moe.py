"""Mixture of experts: each token is sent to a few of many feed-forwards, and beside them through one that all share.

Two losses keep the router in order, both sums over tokens and mean over layers, so that each rank adds its own tokens'
part, nothing is counted twice, and it does not matter how documents were cut into micro-batches, spans or ranks.

The balance loss of a token is E·Σ_e f_e p_e, p its router probabilities and f constants: the share of the choices that
went to expert e, in the token's document (Switch Transformer, 2101.03961, section 2.2; per sequence as in DeepSeek-V3,
2412.19437, section 2.1.2), or in the whole batch of the step before. This step's own would depend on micro-batching,
since most of its tokens are not here yet. The counts of documents are summed once for all layers: however deep the
model is, its ranks wait for each other once.

The z-loss of a token is (log Σ_e exp logit_e)² (ST-MoE, 2202.08906, equation 5): it keeps logits small.

Legend: B spans, T tokens, N = B·T, D model width, L width of what experts see, E experts, X choices a token.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from models.axes import constant, declare, fan_in, positive
from models.delayed_scaling import Magnitudes
from models.dispatch import Dispatch, Dispatched, Here, Sent, by_expert
from models.ffn import MLP, SwiGLU, clamped_swiglu, relu2
from models.kernels.grouped_ffn import FEW, IN_TURN, grouped_linear, mixture, mixture_of_few
from models.kernels.swiglu import swiglu
from models.linear import Linear, cast
from models.router import BALANCES, ROUTERS, BalanceName, Router, RouterName, Routing, within_capacity
from models.sequence import Sequence
from models.width import UNDIVIDED, Width

Beside = Callable[[], Tensor | None]


ExpertName = Literal["swiglu", "clamped", "relu2"]


class Experts(nn.Module):
    """E feed-forwards of a form, SwiGLU, gpt-oss's clamped one, or relu(x W1)² W2, with biases or none. x [N, D],
    choices [N, X] (E: none), weights [N, X] -> [N, D], weighted and summed; and the result of `beside`, which is
    computed while rows are on their way to other devices. room: as `Dispatch` says."""

    def __init__(self, num_experts: int, dim: int, hidden: int, form: ExpertName = "swiglu", bias: bool = False):
        super().__init__()
        self.num_experts, self.hidden, self.form = num_experts, hidden, form
        parts = (hidden,) if form == "relu2" else (hidden, hidden)
        inner, axes = sum(parts), ("expert", "embed", "ffn")
        self.gate_up = declare(num_experts, dim, inner, axes=axes, init=fan_in(dim), parts=parts, along=2)
        self.down = declare(num_experts, hidden, dim, axes=("expert", "ffn", "embed"), init=fan_in(hidden))
        zeros: dict[str, Any] = {"init": constant(0.0), "decay": False, "matrix": False}
        self.gate_up_bias = (
            declare(num_experts, inner, axes=("expert", "ffn"), parts=parts, along=1, **zeros) if bias else None
        )
        self.down_bias = declare(num_experts, dim, axes=("expert", "embed"), **zeros) if bias else None
        self.low: Any = None  # a recipe of few bits (`models.recipes.LowPrecision`)
        # Of earlier steps, where the recipe takes its scales from them.
        self.gate_up_magnitudes: Magnitudes | None = None
        self.down_magnitudes: Magnitudes | None = None

    def forward(
        self,
        x_ND: Tensor,
        choices_NX: Tensor,
        weights_NX: Tensor,
        dispatch: Dispatch,
        beside: Beside,
        room: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        gate_up, down = (dispatch.held(w) for w in (self.gate_up, self.down))
        if self.low is None:
            gate_up, down = cast([gate_up, down], x_ND.dtype)
        plain = self.form == "swiglu" and self.gate_up_bias is None and self.low is None
        if plain and isinstance(dispatch, Here) and (x_ND.device.type, x_ND.dtype) in IN_TURN:
            if len(x_ND) <= FEW and not torch.is_grad_enabled():
                return mixture_of_few(x_ND, weights_NX, choices_NX, gate_up, down), beside()
            order, counts = by_expert(choices_NX, self.num_experts)
            sizes = counts.tolist()
            return mixture(x_ND, weights_NX, order[: sum(sizes)], sizes, gate_up, down), beside()
        sent = dispatch.send(x_ND, choices_NX, self.num_experts, room)
        y_BTD = beside()
        sent = dispatch.receive(sent)
        return dispatch.collect(self.transform(sent, gate_up, down, dispatch), sent, weights_NX), y_BTD

    def transform(self, sent: Sent, gate_up: Tensor, down: Tensor, dispatch: Dispatch) -> Tensor:
        """The experts' outputs [M, D] of the rows that were sent to them."""
        inner_MH = self._multiply(sent.rows, gate_up, sent.offsets, self.gate_up_magnitudes)
        if self.gate_up_bias is not None:
            inner_MH = inner_MH + _of_each(dispatch.held(self.gate_up_bias), sent)
        if self.form == "relu2":
            hidden_MH = relu2(inner_MH)
        elif self.form == "clamped":
            hidden_MH = clamped_swiglu(*inner_MH.chunk(2, dim=-1))
        else:
            hidden_MH = swiglu(inner_MH)
        y_MD = self._multiply(hidden_MH, down, sent.offsets, self.down_magnitudes)
        if self.down_bias is not None:  # of which a device that holds some channels adds as large a share
            share = down.shape[1] / self.hidden
            y_MD = y_MD + share * _of_each(dispatch.held(self.down_bias), sent)
        return y_MD

    def _multiply(self, rows: Tensor, weight: Tensor, offsets: Tensor, past: Magnitudes | None) -> Tensor:
        if self.low is None:
            return grouped_linear(rows, weight, offsets)
        low: Tensor = self.low.grouped(rows, weight, offsets, past)
        return low


def _of_each(bias_EO: Tensor, sent: Sent) -> Tensor:
    """The row [M, O] of its expert for each row that was sent."""
    sizes_E = sent.offsets.diff(prepend=sent.offsets.new_zeros(1)).long()
    return bias_EO.to(sent.rows.dtype).repeat_interleave(sizes_E, dim=0, output_size=len(sent.rows))


class MoE(Dispatched):
    """A mixture of experts: each token's `top_k`, weighted by the router, and a shared one that every token passes.

    num_experts: experts to choose from, the shared one not counted. top_k: number of them that a token goes to, from 1
    to num_experts. hidden: inner width of each of them. expert: its form, SwiGLU (2002.05202), clamped for gpt-oss's
    (2508.10925), or relu2 for two matrices with relu(x)² between them, as in Nemotron-H (2504.03624); the shared one's
    too. latent: width that a token is brought to before it travels to its experts, which work there, and their weighted
    sum back; the router and the shared expert see all of the token, as LatentMoE of Nemotron 3 and Kimi K3; null for
    the model's. bias: true adds one to each product of an expert and to the router's logits. shared_hidden: inner width
    of the shared expert; 0 for none. shared_gate: true scales the shared expert's output by a sigmoid of a linear
    function of the token (Qwen2, 2407.10671). router: scores of the experts for a token; softmax over them, or sigmoid,
    each by itself (DeepSeek-V3, 2412.19437). renormalise: true divides a token's weights, the scores of its experts, by
    their sum. scale: factor of the weights after that. balance: the choices that the balance loss
    (train.balance_weight) evens out: those of each document, those of the whole batch (by the loads of the step
    before), or none. bias_rate: step by which a bias that only chooses experts moves after each step towards those that
    had too few tokens (2408.15664 takes 0.001); 0 for no bias. expert_groups: equal groups that the experts lie in; 1
    for none. top_groups: number of groups that a token's experts may come from. capacity_factor: choices that an expert
    takes of a span of tokens, in multiples of its fair share; later tokens' are dropped, which makes a run depend on
    its layout. null for no limit.

    x [B, T, D] -> [B, T, D] and the Routing that the losses need.
    """

    experts: Experts

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int,
        hidden: int,
        expert: ExpertName = "swiglu",
        latent: int | None = None,
        bias: bool = False,
        shared_hidden: int = 0,
        shared_gate: bool = False,
        router: RouterName = "softmax",
        renormalise: bool = True,
        scale: float = 1.0,
        balance: BalanceName = "document",
        bias_rate: float = 0.0,
        expert_groups: int = 1,
        top_groups: int = 1,
        capacity_factor: float | None = None,
    ):
        super().__init__()
        positive(dim=dim, num_experts=num_experts, hidden=hidden)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}: must lie between 1 and num_experts={num_experts}")
        if expert not in get_args(ExpertName):
            raise ValueError(f"expert={expert}: must be one of {', '.join(get_args(ExpertName))}")
        if latent is not None and latent < 1:
            raise ValueError(f"latent={latent}: must be at least 1, or null for the model's width")
        if shared_hidden and (bias or expert == "clamped"):
            raise ValueError(f"shared_hidden={shared_hidden}: must be 0 with bias=true, and with expert=clamped")
        if router not in ROUTERS:
            raise ValueError(f"router={router}: must be one of {', '.join(ROUTERS)}")
        if balance not in BALANCES:
            raise ValueError(f"balance={balance}: must be one of {', '.join(BALANCES)}")
        if renormalise and top_k == 1 < num_experts:
            raise ValueError("renormalise=true: must be false with top_k=1: every weight would be 1, and teach nothing")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale}: must be above 0")
        if not 0 <= bias_rate < math.inf:
            raise ValueError(f"bias_rate={bias_rate}: must not be negative; 0 for no bias")
        if expert_groups < 1 or num_experts % expert_groups or expert_groups > 1 and num_experts < 2 * expert_groups:
            raise ValueError(f"expert_groups={expert_groups}: must divide num_experts={num_experts}, 2 or more to each")
        if not 1 <= top_groups <= expert_groups:
            raise ValueError(f"top_groups={top_groups}: must lie between 1 and expert_groups={expert_groups}")
        if top_k > top_groups * num_experts // expert_groups:
            raise ValueError(f"top_k={top_k}: must be at most the experts of top_groups={top_groups} groups")
        if shared_hidden < 0:
            raise ValueError(f"shared_hidden={shared_hidden}: must not be negative; 0 for no shared expert")
        if shared_gate and not shared_hidden:
            raise ValueError("shared_gate=true: must be false without a shared expert (shared_hidden=0)")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(f"capacity_factor={capacity_factor}: must be above 0, or null for no limit")
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self.router = Router(
            dim=dim,
            num_experts=num_experts,
            top_k=top_k,
            router=router,
            renormalise=renormalise,
            scale=scale,
            balance=balance,
            bias=bias,
            bias_rate=bias_rate,
            expert_groups=expert_groups,
            top_groups=top_groups,
        )
        self.latent_in = self.latent_out = None
        if latent is not None:
            self.latent_in = Linear(dim, latent, axes=("rank", "embed"))
            self.latent_out = Linear(latent, dim, axes=("embed", "rank"))
        self.experts = Experts(num_experts, latent or dim, hidden, expert, bias)
        beside = partial(MLP, activation="relu2") if expert == "relu2" else SwiGLU
        self.shared = beside(dim=dim, hidden=shared_hidden) if shared_hidden else None
        self.shared_gate = Linear(dim, 1, axes=(None, "embed")) if shared_gate else None
        self.width: Width = UNDIVIDED
        self.dispatch: Dispatch = Here(dropping=capacity_factor is not None)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, Routing]:
        weights_BTX, routing = self.router(x_BTD)
        choices_BTX, room = routing.choices, None
        if self.capacity_factor is not None:
            capacity_B = self.capacity(seq.counted.sum(1))
            kept_BTX = within_capacity(choices_BTX, self.num_experts, capacity_B, seq.counted)
            choices_BTX, weights_BTX = choices_BTX.where(kept_BTX, self.num_experts), weights_BTX * kept_BTX
            routing = routing._replace(dropped=(~kept_BTX).sum(-1))
            room = max(B * self.places(T) for B, T in seq.shapes or [tuple(seq.positions.shape)])
        narrow_BTL = x_BTD if self.latent_in is None else self.latent_in(x_BTD)
        sent = (t.flatten(0, 1) for t in (narrow_BTL, choices_BTX, weights_BTX))
        y_NL, shared_BTD = self.experts(*sent, self.dispatch, partial(self.shared_output, x_BTD), room)
        y_BTD = y_NL.view_as(narrow_BTL)
        y_BTD = y_BTD if self.latent_out is None else self.latent_out(y_BTD)
        y_BTD = y_BTD if shared_BTD is None else y_BTD + shared_BTD
        alike = self.width.alike
        return y_BTD, routing._replace(probabilities=alike(routing.probabilities), z=alike(routing.z))

    def shared_output(self, x_BTD: Tensor) -> Tensor | None:
        """The output of the expert that every token passes, [B, T, D]; None without one."""
        if self.shared is None:
            return None
        y_BTD = self.shared.transform(x_BTD)
        return y_BTD if self.shared_gate is None else self.shared_gate(x_BTD).sigmoid() * y_BTD

    def places(self, tokens: int) -> int:
        """The most choices that an expert accepts from a span of so many counted tokens."""
        assert self.capacity_factor is not None
        return math.ceil(self.capacity_factor * tokens * self.top_k / self.num_experts - 1e-9)

    def capacity(self, tokens_B: Tensor) -> Tensor:
        """The same of several spans, [B] int64."""
        assert self.capacity_factor is not None
        fair_B = self.capacity_factor * tokens_B.double() * self.top_k / self.num_experts
        return (fair_B - 1e-9).ceil().long()


class Routed(NamedTuple):
    """Sums of the routers of all layers over this device's counted tokens."""

    balance: Tensor  # scalar with gradient, mean over layers; 1 a token when balanced
    load: dict[str, Tensor]  # by layer, choices of each expert [E] int64
    z: Tensor  # scalar with gradient, the z-loss, mean over layers
    dropped: dict[str, Tensor]  # by layer that has a capacity, how many choices found no place


def balance(routings: dict[str, Routing], seq: Sequence, *, layers: int | None = None) -> Routed:
    """The losses and counts of all layers, by their names; zeros without any. One `seq.sum` for all of them.

    layers: over how many the losses are means, where others have theirs elsewhere; None: over these.
    """
    if not routings or seq.decoding:
        return Routed(torch.zeros((), device=seq.counted.device), {}, torch.zeros((), device=seq.counted.device), {})
    counted = seq.counted.unsqueeze(-1)
    with torch.no_grad():
        chosen = {n: torch.zeros_like(r.probabilities).scatter_(-1, r.choices, 1) for n, r in routings.items()}
        chosen = {n: c * counted for n, c in chosen.items()}
        given = {n: r.frequencies for n, r in routings.items() if r.frequencies is not None}
        frequencies = given | _of_documents({n: c for n, c in chosen.items() if n not in given}, seq)
    losses = [
        r.probabilities.shape[-1] / r.choices.shape[-1] * (r.probabilities * frequencies[n] * counted).sum()
        for n, r in routings.items()
    ]
    share = 1.0 if layers is None else len(routings) / layers
    return Routed(
        balance=torch.stack(losses).mean() * share,
        load={n: c.sum((0, 1)).long() for n, c in chosen.items()},
        z=torch.stack([(r.z * seq.counted).sum() for r in routings.values()]).mean() * share,
        dropped={n: (r.dropped * seq.counted).sum() for n, r in routings.items() if r.dropped is not None},
    )


def _of_documents(chosen: dict[str, Tensor], seq: Sequence) -> dict[str, Tensor]:
    """Average choices of each expert by a token of the same document, for each layer [B, T, E]."""
    if not chosen:
        return {}
    several = list(chosen.values())
    counted = seq.counted.unsqueeze(-1).to(several[0].dtype)
    per_document = seq.sum(torch.cat([*several, counted], dim=-1))
    frequencies = (per_document / per_document[:, -1:].clamp_min(1))[seq.documents]
    return dict(zip(chosen, frequencies[..., :-1].split([c.shape[-1] for c in several], dim=-1), strict=True))


def mixtures(model: nn.Module) -> dict[str, MoE]:
    """The mixture of experts of each layer and MTP module that has one, by its name as in `Routed.load`."""
    return {
        f"{where}.{name}": moe
        for where in ("layers", "mtp")
        for name, block in getattr(model, where).items()
        for moe in block.modules()
        if isinstance(moe, MoE)
    }
