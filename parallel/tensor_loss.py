"""The vocabulary cut over a tensor group: the embedding's rows, and the cross-entropy of a head of which each rank has
some rows.

A rank computes the logits of its own rows, and their logsumexp; the ranks exchange that and the target's logit, which
one of them has: 2 numbers a token. The gradient (softmax - onehot) of its own logits is then each rank's own, and those
of x are parts of a sum, which the all-gather of x takes in its backward. (Megatron-LM, 1909.08053, section 3.)

Legend: N tokens, C tokens of a chunk, D model width, V this rank's rows of the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.cross_entropy import NO_TARGET, Scored, softcap_slope, softcapped
from models.precision import wide
from parallel.collectives import Comm

PURPOSE = "loss"


def embed(tokens: Tensor, table_VD: Tensor, first: int) -> Tensor:
    """The rows of this rank's part of the table, from the vocabulary's row `first` on; zeros for others' tokens."""
    index, elsewhere = _own(tokens, len(table_VD), first)
    return F.embedding(index, table_VD).masked_fill(elsewhere.unsqueeze(-1), 0.0)


def _own(tokens: Tensor, rows: int, first: int) -> tuple[Tensor, Tensor]:
    """The tokens as rows of this rank's part, 0 for those that are elsewhere, and a mask of these."""
    elsewhere = (tokens < first) | (tokens >= first + rows)
    return (tokens - first).masked_fill(elsewhere, 0), elsewhere


def _over_all(comm: Comm, z_CV: Tensor, index_C: Tensor, elsewhere_C: Tensor) -> tuple[Tensor, Tensor]:
    """The logsumexp of the logits over all ranks, and the target's logit, [C] each."""
    own_C = z_CV.gather(-1, index_C.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere_C, 0.0)
    both_P2C = comm.all_gather(torch.stack((z_CV.logsumexp(-1), own_C)), purpose=PURPOSE)
    return both_P2C[:, 0].logsumexp(0), both_P2C[:, 1].sum(0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        comm: Comm,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        first: int,
        chunk: int,
        cap: float | None,
    ) -> Tensor:
        cast_VD = weight_VD.to(x_ND.dtype)
        total = wide(x_ND.new_zeros(()))
        dx_ND, dweight_VD = torch.empty_like(x_ND), torch.zeros_like(wide(weight_VD))
        for x_CD, targets_C, dx_CD in zip(x_ND.split(chunk), targets_N.split(chunk), dx_ND.split(chunk), strict=True):
            missing_C = targets_C == NO_TARGET
            index_C, elsewhere_C = _own(targets_C, len(weight_VD), first)
            z_CV = softcapped(wide(x_CD @ cast_VD.T), cap)
            sum_C, target_C = _over_all(comm, z_CV, index_C, elsewhere_C)
            total += (sum_C - target_C).masked_fill(missing_C, 0.0).sum()
            dz_CV = (z_CV - sum_C.unsqueeze(-1)).exp()
            onehot_C1 = (~elsewhere_C).to(dz_CV.dtype).unsqueeze(-1)
            dz_CV.scatter_add_(-1, index_C.unsqueeze(-1), -onehot_C1)
            dz_CV = dz_CV.masked_fill(missing_C.unsqueeze(-1), 0.0)
            dz_CV = (dz_CV if cap is None else dz_CV * softcap_slope(z_CV, cap)).to(x_ND.dtype)
            torch.mm(dz_CV, cast_VD, out=dx_CD)
            dweight_VD += dz_CV.T @ x_CD
        ctx.save_for_backward(dx_ND, dweight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dweight_VD = ctx.saved_tensors
        return None, grad * dx_ND, grad * dweight_VD, None, None, None, None


def cross_entropy(
    comm: Comm,
    x: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    first: int,
    *,
    chunk: int | None,
    softcap: float | None = None,
) -> Tensor:
    """As `models.kernels.cross_entropy.cross_entropy`, on every rank, the weight being this rank's rows from `first`
    on. The gradient of x is this rank's part. Collective."""
    if not torch.is_grad_enabled():
        return score(comm, x, weight_VD, targets, first, chunk=chunk, softcap=softcap).total
    x_ND = x.flatten(0, -2)
    total: Tensor = _CrossEntropy.apply(
        comm, x_ND, weight_VD, targets.flatten(), first, chunk or max(len(x_ND), 1), softcap
    )
    return total


@torch.no_grad()
def score(
    comm: Comm,
    x: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    first: int,
    *,
    chunk: int | None,
    softcap: float | None = None,
) -> Scored:
    """As `models.kernels.cross_entropy.score`, on every rank. Collective."""
    x_ND, targets_N = x.flatten(0, -2), targets.flatten()
    cast_VD, size = weight_VD.to(x.dtype), chunk or max(len(x_ND), 1)
    nats, right = [], []
    for x_CD, targets_C in zip(x_ND.split(size), targets_N.split(size), strict=True):
        missing_C = targets_C == NO_TARGET
        index_C, elsewhere_C = _own(targets_C, len(weight_VD), first)
        z_CV = softcapped(wide(x_CD @ cast_VD.T), softcap)
        sum_C, target_C = _over_all(comm, z_CV, index_C, elsewhere_C)
        nats.append((sum_C - target_C).masked_fill(missing_C, 0.0))
        largest_C, place_C = z_CV.max(-1)
        both_P2C = comm.all_gather(torch.stack((largest_C, (place_C + first).to(z_CV.dtype))), purpose=PURPOSE)
        rank_C = both_P2C[:, 0].argmax(0)  # the first of several: the lowest token, as on one device
        right.append(both_P2C[:, 1].gather(0, rank_C.unsqueeze(0)).squeeze(0).long() == targets_C)
    each_N, right_N = torch.cat(nats), torch.cat(right)
    return Scored(each_N.sum(), right_N.sum(), each_N.view(targets.shape), right_N.view(targets.shape))
