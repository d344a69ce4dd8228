"""Cross-entropy of a linear head, a chunk of tokens at a time: the logits [N, V] of all tokens are never held together.

The gradient of Σ_n (logsumexp z_n - z_n[target]), z = x Wᵀ, is (softmax z_n - onehot) for each row of z. It depends on
nothing behind the loss but a factor, so each chunk gives its gradients of x and W while its logits are there, and the
backward pass only multiplies. The work is that of the plain way, which holds N·V numbers several times; this holds
N·D + V·D, and C·V for a moment. (Cut cross-entropy, 2411.09009, avoids even the latter; Liger, 2410.10989, is alike.)

Legend: N tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.precision import wide

NO_TARGET = -100


def softcapped(z: Tensor, softcap: float | None) -> Tensor:
    """c·tanh(z / c) (Gemma 2, 2408.00118): z itself where it is small, never beyond c; with None z itself."""
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def softcap_slope(capped: Tensor, softcap: float) -> Tensor:
    """The derivative of `softcapped`, from its result."""
    return 1 - (capped / softcap).square()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, cap: float | None) -> Tensor:
        cast_VD = weight_VD.to(x_ND.dtype)
        total = wide(x_ND.new_zeros(()))
        dx_ND, dweight_VD = torch.empty_like(x_ND), torch.zeros_like(wide(weight_VD))
        for x_CD, targets_C, dx_CD in zip(x_ND.split(chunk), targets_N.split(chunk), dx_ND.split(chunk), strict=True):
            z_CV = softcapped(wide(x_CD @ cast_VD.T), cap)
            log_p_CV = z_CV.log_softmax(-1)
            missing_C, index_C1 = _missing(targets_C)
            total -= log_p_CV.gather(-1, index_C1).squeeze(-1).masked_fill_(missing_C, 0.0).sum()
            dz_CV = log_p_CV.exp_()
            dz_CV.scatter_add_(-1, index_C1, dz_CV.new_full((), -1.0).expand_as(index_C1))
            dz_CV = dz_CV.masked_fill_(missing_C.unsqueeze(-1), 0.0)
            dz_CV = (dz_CV if cap is None else dz_CV * softcap_slope(z_CV, cap)).to(x_ND.dtype)
            torch.mm(dz_CV, cast_VD, out=dx_CD)
            if dweight_VD.dtype == dz_CV.dtype:
                dweight_VD.addmm_(dz_CV.T, x_CD)
            else:
                dweight_VD += dz_CV.T @ x_CD
        ctx.save_for_backward(dx_ND, dweight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dweight_VD = ctx.saved_tensors
        return grad * dx_ND, grad * dweight_VD, None, None, None


def _missing(targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """A mask [C] bool of places without a target, and the targets to gather by [C, 1], 0 there."""
    return targets_C == NO_TARGET, targets_C.clamp_min(0).unsqueeze(-1)


def cross_entropy(
    x: Tensor, weight_VD: Tensor, targets: Tensor, *, chunk: int | None, softcap: float | None = None
) -> Tensor:
    """Σ over targets of -log softmax(x Wᵀ)[target] in nats: a scalar in at least fp32.

    x: [..., D], as the head gets it; the weight is cast to its dtype at use. targets: [...] int64, -100 where there is
    none; without any, the sum is a zero whose gradients are zeros, not missing. chunk: tokens whose logits are held at
    a time; None for all. softcap: bounds the logits, see `softcapped`.
    """
    if not torch.is_grad_enabled():
        return score(x, weight_VD, targets, chunk=chunk, softcap=softcap)[0]
    x_ND = x.flatten(0, -2)
    return _CrossEntropy.apply(x_ND, weight_VD, targets.flatten(), chunk or max(len(x_ND), 1), softcap)


class Scored(NamedTuple):
    """The scores of some targets: their nats, summed; how many are the likeliest token, int64; and both of each, of the
    targets' shape, 0 and False where there is none."""

    total: Tensor
    correct: Tensor
    nats: Tensor
    right: Tensor


@torch.no_grad()
def score(x: Tensor, weight_VD: Tensor, targets: Tensor, *, chunk: int | None, softcap: float | None = None) -> Scored:
    """The same cross-entropy, bitwise, and how many targets are the likeliest token; no gradients."""
    x_ND, targets_N = x.flatten(0, -2), targets.flatten()
    cast_VD, size = weight_VD.to(x.dtype), chunk or max(len(x_ND), 1)
    total, nats, right = wide(x.new_zeros(())), [], []
    for x_CD, targets_C in zip(x_ND.split(size), targets_N.split(size), strict=True):
        z_CV = x_CD @ cast_VD.T
        missing_C, index_C1 = _missing(targets_C)
        right.append(z_CV.argmax(-1) == targets_C)
        nats.append(
            -softcapped(wide(z_CV), softcap)
            .log_softmax(-1)
            .gather(-1, index_C1)
            .squeeze(-1)
            .masked_fill_(missing_C, 0.0)
        )
        total += nats[-1].sum()
    each = torch.cat(right).view(targets.shape)
    return Scored(total, each.sum(), torch.cat(nats).view(targets.shape), each)
