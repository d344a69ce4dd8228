"""silu(gate) ⊙ up, between the two products of a SwiGLU (2002.05202), a tile of rows at a time.

Written with operators of whole tensors, the silu of every gate goes through memory and stays there for the backward
pass, and the two halves of the gradient are joined by a copy. Here only the inner rows are kept, a tile of them stays
in the cache, and each half of the gradient is written where it belongs. With s = silu(gate) the gradients are

    dup = dy · s,    dgate = dy · up · s'.

Legend: N rows, H hidden channels; inner [N, 2H] holds gate, then up.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.registry import fused

TILE = 1 << 18  # elements of a tile of inner rows: 1 MiB in fp32; smaller ones cost more in calls than they save


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        ctx.save_for_backward(inner)
        H = inner.shape[-1] // 2
        y = inner.new_empty((*inner.shape[:-1], H))
        for inner_NH, y_NH in zip(_tiles(inner), _tiles(y, 2), strict=True):
            torch.mul(F.silu(inner_NH[:, :H]), inner_NH[:, H:], out=y_NH)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inner,) = ctx.saved_tensors
        H, dinner = grad.shape[-1], torch.empty_like(inner, memory_format=torch.contiguous_format)
        for inner_NH, dy_NH, dinner_NH in zip(_tiles(inner), _tiles(grad, 2), _tiles(dinner), strict=True):
            gate_NH, up_NH = inner_NH[:, :H], inner_NH[:, H:]
            torch.mul(dy_NH, F.silu(gate_NH), out=dinner_NH[:, H:])
            torch.ops.aten.silu_backward.grad_input(dy_NH * up_NH, gate_NH, grad_input=dinner_NH[:, :H])
        return dinner


def swiglu(inner: Tensor) -> Tensor:
    """silu(gate) · up of inner [..., 2H], gate first, in its dtype -> [..., H]."""
    if torch.compiler.is_compiling():  # a compiler fuses the plain operators by itself
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate) * up
    if (kernel := fused("swiglu", inner)) is not None:
        return kernel(*inner.chunk(2, dim=-1))
    if torch.is_grad_enabled():
        y: Tensor = _SwiGLU.apply(inner)
        return y
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _tiles(x: Tensor, share: int = 1) -> tuple[Tensor, ...]:
    """Rows of x [..., W], cut into tiles where there is a cache; share: the inner rows' width over W."""
    rows = x.reshape(-1, x.shape[-1])
    size = max(1, TILE // (share * x.shape[-1])) if x.device.type == "cpu" else max(1, len(rows))
    return rows.split(size)
