"""The feed-forwards of many experts, each on its own tokens.

`mixture` is the way of a CPU that holds all experts: one after the other, its tokens gathered, multiplied, weighted and
added to the output while they are in the cache. No array of all rows is made besides what the first matmul gives, which
is kept for the backward; writing such arrays, and the page faults of it, cost half as much as the matmuls. The router's
weight multiplies before the second matmul, where rows are narrow: w (a W) = (w a) W, and its gradient is Σ (dy Wᵀ) a,
without the expert's output. `grouped_linear` is for everything else: a fused matmul of rows that somebody has grouped.

Legend: N tokens, D model width, E experts, X choices a token, M rows in expert order (N·X, less what was dropped),
H inner width of an expert, C tokens of one expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.precision import wide
from models.recompute import kept

FUSED = (torch.float32, torch.bfloat16)
ALIGNED = 16  # bytes, of a row that the fused operator takes
FEW = 32  # tokens that `mixture_of_few` takes: more of them ask for every expert
IN_TURN = {("cpu", torch.float32), ("cpu", torch.float64)}  # where `mixture` is faster; bf16 is converted


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows [M, I] in expert order, weight [E, I, O], offsets [E] int32 (where each expert's rows end) -> [M, O].

    The fused operator takes rows of whole 16 bytes alone; other widths, as of hidden channels that ranks have divided,
    are multiplied one expert at a time.
    """
    whole = all(width * weight.itemsize % ALIGNED == 0 for width in weight.shape[1:])
    if rows.dtype not in FUSED or not whole:
        return loop(rows, weight, offsets)
    return F.grouped_mm(rows, weight, offs=offsets)


def grouped_weight_gradient(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """The gradient [E, I, O] of `grouped_linear`'s weight, of rows [M, I] and the output's gradient [M, O]."""
    whole = all(width * x.itemsize % ALIGNED == 0 for x in (rows, grad) for width in x.shape[1:])
    if rows.dtype in FUSED and whole:
        return F.grouped_mm(rows.T, grad, offs=offsets)
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return torch.stack([part.T @ g for part, g in zip(rows.split(sizes), grad.split(sizes), strict=True)])


def loop(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The same by one matmul an expert: the reference, and the path of dtypes that the fused operator lacks (fp64)."""
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return torch.cat([part @ w for part, w in zip(rows.split(sizes), weight, strict=True)])


def mixture(
    x_ND: Tensor, weights_NX: Tensor, order_M: Tensor, sizes: list[int], gate_up_EDH: Tensor, down_EHD: Tensor
) -> Tensor:
    """Σ over a token's experts of weight · (silu(x W1) ⊙ x W3) W2 -> [N, D] in x's dtype, summed in fp32 or better.

    order [M] int64: flat indices into [N, X] in expert order, of which expert e has sizes[e]. gate_up [E, D, 2H]: W1
    beside W3. down [E, H, D]. weights may be wider than x.
    """
    return _Mixture.apply(x_ND, weights_NX, order_M, sizes, gate_up_EDH, down_EHD)


def mixture_of_few(
    x_ND: Tensor, weights_NX: Tensor, choices_NX: Tensor, gate_up_EDH: Tensor, down_EHD: Tensor
) -> Tensor:
    """`mixture` for a handful of tokens and no gradient: only experts that have some are looked at, and what lies
    between the two products is one pass over all rows. A choice of E is of no expert."""
    E, (N, X) = len(gate_up_EDH), choices_NX.shape
    chosen = sorted((e, at) for at, e in enumerate(choices_NX.flatten().tolist()) if e < E)
    order_M = torch.tensor([at for _, at in chosen], dtype=torch.int64, device=x_ND.device)
    token_M = order_M // X
    x_MD = x_ND.expand(len(chosen), -1) if N == 1 else x_ND.index_select(0, token_M)
    inner_MH, y_MD = x_ND.new_empty(len(chosen), gate_up_EDH.shape[2]), x_ND.new_empty(x_MD.shape)
    runs = _runs([e for e, _ in chosen])
    for e, begin, count in runs:
        torch.mm(x_MD.narrow(0, begin, count), gate_up_EDH.select(0, e), out=inner_MH.narrow(0, begin, count))
    gate_MH, up_MH = wide(inner_MH).chunk(2, dim=-1)
    weight_M1 = weights_NX.flatten().index_select(0, order_M).unsqueeze(-1)
    hidden_MH = F.silu(gate_MH).mul_(up_MH).mul_(weight_M1).to(x_ND.dtype)
    for e, begin, count in runs:
        torch.mm(hidden_MH.narrow(0, begin, count), down_EHD.select(0, e), out=y_MD.narrow(0, begin, count))
    if N == 1:
        return wide(y_MD).sum(0, keepdim=True).to(x_ND.dtype)
    return torch.zeros_like(wide(x_ND)).index_add_(0, token_M, wide(y_MD)).to(x_ND.dtype)


def _runs(experts: list[int]) -> list[tuple[int, int, int]]:
    """Value, begin and length of each run of equal values."""
    begins = [i for i, e in enumerate(experts) if not i or e != experts[i - 1]]
    return [(experts[a], a, b - a) for a, b in zip(begins, [*begins[1:], len(experts)], strict=True)]


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_NX: Tensor, order_M: Tensor, sizes: list[int], gate_up: Tensor, down: Tensor
    ) -> Tensor:
        token_M = order_M // weights_NX.shape[1]
        weight_M1 = weights_NX.flatten()[order_M].unsqueeze(-1)

        def run() -> tuple[Tensor, ...]:
            """The output, and each expert's inner rows: arrays of their own, so that a policy may keep them."""
            y_ND, inners = torch.zeros_like(wide(x_ND)), []
            parts = zip(token_M.split(sizes), weight_M1.split(sizes), gate_up, down, strict=True)
            for token_C, weight_C1, gate_up_DH, down_HD in parts:
                inners.append(x_ND.index_select(0, token_C) @ gate_up_DH)
                gate_CH, up_CH = wide(inners[-1]).chunk(2, dim=-1)
                hidden_CH = F.silu(gate_CH).mul_(up_CH).mul_(weight_C1)
                y_ND.index_add_(0, token_C, wide(hidden_CH.to(x_ND.dtype) @ down_HD))
            return y_ND.to(x_ND.dtype), *inners

        y_ND, *inners = kept(run)
        ctx.save_for_backward(x_ND, weight_M1, order_M, token_M, gate_up, down, *inners)
        ctx.sizes, ctx.choices = sizes, weights_NX.shape
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_M1, order_M, token_M, gate_up, down, *inners = ctx.saved_tensors
        dtype, H, sizes = x_ND.dtype, down.shape[1], ctx.sizes
        dx_ND = torch.zeros_like(wide(x_ND))
        dgate_up, ddown, dweight_M1 = (torch.empty_like(x) for x in (gate_up, down, weight_M1))
        rows = zip(*(t.split(sizes) for t in (token_M, weight_M1, dweight_M1)), inners, strict=True)
        for e, (token_C, weight_C1, dweight_C1, inner_CH) in enumerate(rows):
            dy_CD = dy_ND.index_select(0, token_C)
            gate_CH, up_CH = wide(inner_CH).chunk(2, dim=-1)
            silu_CH = F.silu(gate_CH)
            hidden_CH = silu_CH * up_CH
            dhidden_CH = wide(dy_CD @ down[e].T)
            torch.sum(dhidden_CH * hidden_CH, -1, keepdim=True, out=dweight_C1)
            torch.mm(hidden_CH.mul_(weight_C1).to(dtype).T, dy_CD, out=ddown[e])
            dhidden_CH.mul_(weight_C1)
            dinner_CH = torch.empty_like(wide(inner_CH))
            torch.mul(dhidden_CH, silu_CH, out=dinner_CH[:, H:])
            dgate_CH = dhidden_CH.mul_(up_CH)
            torch.ops.aten.silu_backward.grad_input(dgate_CH, gate_CH, grad_input=dinner_CH[:, :H])
            dinner_CH = dinner_CH.to(dtype)
            torch.mm(x_ND.index_select(0, token_C).T, dinner_CH, out=dgate_up[e])
            dx_ND.index_add_(0, token_C, wide(dinner_CH @ gate_up[e].T))
        dweights_NX = dweight_M1.new_zeros(ctx.choices)
        dweights_NX.view(-1)[order_M] = dweight_M1.squeeze(-1)
        return dx_ND.to(dtype), dweights_NX, None, None, dgate_up, ddown
