"""Rows of unit length, times a weight: what RMS norms and normalised keys share, a tile of rows at a time.

    y = s · x · r · w,    r = (Σx² + c)^-½ of the row

Written with operators of whole tensors, squares, means, roots and products each go through memory, and autograd keeps
several of them. A tile stays in the cache; only x and r are kept. With g = s · w · dy the gradients are

    dx = r · (g - x · r² · Σ(g x)),    dw = s · Σ over rows of dy · x · r.

Legend: N rows, D entries of a row.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.registry import fused
from models.precision import wide

TILE = 1 << 16  # elements: 256 KiB in fp32, of which a core's cache holds several
FEW = 1 << 14  # elements of the rows of a token
FUSED = ("cuda",)  # devices on which torch's own operator is one kernel, forward and backward
GATES = {F.silu: "swish", torch.sigmoid: "sigmoid"}  # activations of a gate that the kernel with one has
WIDEST = 1 << 15  # entries of a row that flash-linear-attention's kernels take, of 16 bits


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor | None, scale: float, floor: float) -> Tensor:
        N, D = x_ND.shape
        y_ND, r_N1 = torch.empty_like(x_ND), x_ND.new_empty((N, 1))
        factor_D = scale if weight_D is None else scale * weight_D
        for rows in _tiles(x_ND):
            x = x_ND[rows]
            r = torch.rsqrt(x.square().sum(-1, keepdim=True).add_(floor), out=r_N1[rows])
            torch.mul(x, r, out=y_ND[rows]).mul_(factor_D)
        ctx.save_for_backward(x_ND, weight_D, r_N1)
        ctx.scale = scale
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, r_N1 = ctx.saved_tensors
        dx_ND = torch.empty_like(x_ND)
        dweight_D = None if weight_D is None else torch.zeros_like(weight_D)
        factor_D = ctx.scale if weight_D is None else ctx.scale * weight_D
        for rows in _tiles(x_ND):
            n, r, g = x_ND[rows] * r_N1[rows], r_N1[rows], grad_ND[rows]
            gn = g * n
            if dweight_D is not None:
                dweight_D += gn.sum(0)
            inner = gn.mul_(factor_D).sum(-1, keepdim=True)
            torch.mul(g, factor_D, out=dx_ND[rows]).addcmul_(n, inner, value=-1).mul_(r)
        return dx_ND, None if dweight_D is None else dweight_D.mul_(ctx.scale), None, None


def rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in at least fp32."""
    D = x.shape[-1]
    return _normalise(x, weight_D, D**0.5, D * eps)


def rms_norm_narrow(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The same in x's dtype; on CUDA one kernel that reads and writes 16 bits."""
    if x.shape[-1] <= WIDEST and (kernel := fused("rms_norm", x)) is not None:
        return kernel(x, weight_D, None, eps=eps)
    return rms_norm(x, weight_D, eps).to(x.dtype)


def rms_norm_gated(
    x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """rms_norm(x) · activation(gate), in the gate's dtype; on CUDA one kernel where both have 16 bits."""
    alike = x.dtype == gate.dtype and x.shape == gate.shape and x.shape[-1] <= WIDEST and activation in GATES
    if alike and (kernel := fused("rms_norm_gated", x)) is not None:
        return kernel(x, gate, weight_D, None, activation=GATES[activation], eps=eps)
    return (rms_norm(x, weight_D, eps) * activation(wide(gate))).to(gate.dtype)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(Σx² + eps) over the last dimension, in at least fp32."""
    if x.shape[-1] <= WIDEST and (kernel := fused("l2_norm", x)) is not None:
        return kernel(x, eps=eps, output_dtype=torch.float32)
    return _normalise(x, None, 1.0, eps)


def _normalise(x: Tensor, weight_D: Tensor | None, scale: float, floor: float) -> Tensor:
    if x.device.type in FUSED or torch.compiler.is_compiling():  # a compiler fuses the plain operator by itself
        D = x.shape[-1]
        y = F.rms_norm(wide(x), (D,), None if weight_D is None else weight_D.to(wide(x).dtype), floor / D)
        return y if scale == D**0.5 else y * (scale * D**-0.5)
    if not torch.is_grad_enabled() and x.numel() <= FEW:  # as of a token: a function's call costs more than its work
        x = wide(x)
        if scale == (D := x.shape[-1]) ** 0.5:
            return F.rms_norm(x, (D,), None if weight_D is None else weight_D.to(x.dtype), floor / D)
        r = x.square().sum(-1, keepdim=True).add_(floor).rsqrt_()
        return (x * r).mul_(scale if weight_D is None else scale * weight_D.to(x.dtype))
    rows_ND = wide(x).reshape(-1, x.shape[-1])
    weight_D = None if weight_D is None else weight_D.to(rows_ND.dtype)
    return _Normalise.apply(rows_ND, weight_D, scale, floor).view(x.shape)


def _tiles(x_ND: Tensor) -> list[slice]:
    N, D = x_ND.shape
    size = max(1, TILE // D) if x_ND.device.type == "cpu" else max(1, N)
    return [slice(begin, begin + size) for begin in range(0, N, size)]
