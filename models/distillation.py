"""Distillation: a model learns from another one, its teacher, that has read the same tokens (Hinton et al. 2015,
1503.02531).

Two objectives. `AlignLayers` gives each of some layers the residual stream that entered the teacher's layer of the same
place, and asks for the one that left it: layers learn apart, each from a right input, whatever the ones below do by now
(MOHAWK, 2408.10189, its second stage). `MatchLogits` asks for the teacher's distribution over the next token.

Each objective is called inside of the model's forward pass, `model(tokens, seq, targets, objective=…)`: there, where
weights are sharded over ranks, they are whole. They are sums over the places that have a target, so that the parts of
spans and ranks add up, as the cross-entropy does.

Legend: B spans, T tokens, D model width, V vocabulary, N tokens in all, C tokens of a chunk.
"""

from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.cross_entropy import NO_TARGET, softcap_slope, softcapped
from models.lm import LM, Output
from models.moe import balance
from models.precision import wide
from models.sequence import Sequence

LEAST = 1e-12  # of what a layer adds to a token's stream, squared: the divisor of its error


class HeadInputs(NamedTuple):
    """The logits of a model before they are multiplied out: x [B, T, D] times weightᵀ, weight [V, D], then capped."""

    x: Tensor
    weight: Tensor
    softcap: float | None


class Distilled(NamedTuple):
    """The sums of one pass over places with a target.

    output: as the model gives it; its cross-entropy has no gradient. objective: scalar with gradient, in nats, or in
    layers' errors. divergence: scalar without gradient: of the teacher's distribution from the model's, in nats; 0
    where layers are aligned.
    """

    output: Output
    objective: Tensor
    divergence: Tensor


@torch.no_grad()
def read_streams(model: LM, tokens_BT: Tensor, seq: Sequence, targets_BT: Tensor) -> list[Tensor]:
    """The residual streams of a teacher [B, T, D]: that which enters each layer, and that which leaves the last."""
    streams, handed = [model.embed(tokens_BT)], dict[str, Tensor]()
    for i in range(len(model.kinds)):
        x_BTD, handed, _ = model.run(range(i, i + 1), streams[-1], handed, seq)
        streams.append(x_BTD)
    return streams


@torch.no_grad()
def read_head(model: LM, tokens_BT: Tensor, seq: Sequence, targets_BT: Tensor) -> HeadInputs:
    """A teacher's logits of all tokens, not multiplied out."""
    x_BTD, _, _ = model.run(range(len(model.kinds)), model.embed(tokens_BT), {}, seq)
    return HeadInputs(*model.before_head(model.norm(x_BTD)), model.logit_softcap)


@dataclass(frozen=True)
class AlignLayers:
    """Σ over tokens with a target of the mean over `layers` of ‖y - t‖² / ‖t - x‖²: x is the teacher's stream that
    enters a layer, t the one that leaves its layer, y the one that leaves ours. 1 is what a layer that does nothing
    gets.

    streams: of `read_streams`.
    """

    streams: Listed[Tensor]
    layers: Listed[int]

    def __call__(self, model: LM, tokens_BT: Tensor, seq: Sequence, targets_BT: Tensor) -> Distilled:
        asked_BT, total = targets_BT != NO_TARGET, wide(self.streams[0].new_zeros(()))
        for i in self.layers:
            x_BTD, t_BTD = self.streams[i], self.streams[i + 1]
            y_BTD, _, _ = model.run(range(i, i + 1), x_BTD, {}, seq)
            error_BT = (wide(y_BTD) - wide(t_BTD)).square().sum(-1)
            added_BT = (wide(t_BTD) - wide(x_BTD)).square().sum(-1).clamp_min(LEAST)
            total = total + (error_BT / added_BT).masked_fill(~asked_BT, 0.0).sum()
        total, zero = total / len(self.layers), total.new_zeros(()).detach()
        return Distilled(Output(tokens_BT.new_empty(0), zero, {}, zero, {}, total.detach()), total, zero)


@dataclass(frozen=True)
class MatchLogits:
    """(1 - weight) · cross-entropy + weight · temperature² · KL(teacher ‖ model), summed over the targets; both
    distributions of the divergence are those at this temperature, whose square keeps the gradient's size.

    taught: of `read_head`.
    """

    taught: HeadInputs
    weight: float
    temperature: float

    def __call__(self, model: LM, tokens_BT: Tensor, seq: Sequence, targets_BT: Tensor) -> Distilled:
        x_BTD, _, routings = model.run(range(len(model.kinds)), model.embed(tokens_BT), {}, seq)
        counts = balance(routings, seq)
        x_BTD, weight_VD = model.before_head(model.norm(x_BTD))
        chunk = model.loss_chunk or max(targets_BT.numel(), 1)
        how = chunk, model.logit_softcap, self.weight, self.temperature
        teacher = self.taught.x.flatten(0, -2), self.taught.weight, self.taught.softcap
        objective, nats, divergence = _Match.apply(x_BTD.flatten(0, -2), weight_VD, targets_BT.flatten(), teacher, how)
        output = Output(x_BTD.new_empty(0), *counts, nats, index_loss=seq.index_losses.take())
        return Distilled(output, objective, divergence)


class _Match(torch.autograd.Function):
    """The gradient of a chunk's objective is worked out while its logits are there (`models.kernels.cross_entropy`)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        teacher: tuple[Tensor, Tensor, float | None],
        how: tuple[int, float | None, float, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunk, cap, share, heat = how
        taught_ND, taught_VD, taught_cap = teacher
        cast_VD, taught_VD = weight_VD.to(x_ND.dtype), taught_VD.to(taught_ND.dtype)
        nats, divergence = wide(x_ND.new_zeros(())), wide(x_ND.new_zeros(()))
        dx_ND, dweight_VD = torch.empty_like(x_ND), torch.zeros_like(wide(weight_VD))
        pieces = (each.split(chunk) for each in (x_ND, taught_ND, targets_N, dx_ND))
        for x_CD, taught_CD, targets_C, dx_CD in zip(*pieces, strict=True):
            missing_C1, index_C1 = (targets_C == NO_TARGET).unsqueeze(-1), targets_C.clamp_min(0).unsqueeze(-1)
            z_CV = softcapped(wide(x_CD @ cast_VD.T), cap)
            taught_CV = (softcapped(wide(taught_CD @ taught_VD.T), taught_cap) / heat).log_softmax(-1)
            log_p_CV, hot_CV = z_CV.log_softmax(-1), (z_CV / heat).log_softmax(-1)
            nats -= log_p_CV.gather(-1, index_C1).masked_fill(missing_C1, 0.0).sum()
            p_CV = taught_CV.exp()
            apart_C1 = (p_CV * (taught_CV - hot_CV)).sum(-1, keepdim=True)
            divergence += apart_C1.masked_fill(missing_C1, 0.0).sum()
            dz_CV = (1 - share) * log_p_CV.exp()
            dz_CV.scatter_add_(-1, index_C1, dz_CV.new_full((), share - 1).expand_as(index_C1))
            dz_CV += share * heat * (hot_CV.exp() - p_CV)
            dz_CV = dz_CV if cap is None else dz_CV * softcap_slope(z_CV, cap)
            dz_CV = dz_CV.masked_fill(missing_C1, 0.0).to(x_ND.dtype)
            torch.mm(dz_CV, cast_VD, out=dx_CD)
            dweight_VD += dz_CV.T @ x_CD
        ctx.save_for_backward(dx_ND, dweight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nats, divergence)
        return (1 - share) * nats + share * heat**2 * divergence, nats, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        dx_ND, dweight_VD = ctx.saved_tensors
        return grad * dx_ND, grad * dweight_VD, None, None, None
