"""Every matmul with a weight goes through here: fp32 master weights, multiplied in the dtype of the activations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.axes import Init, constant, declare, fan_in
from models.delayed_scaling import Magnitudes
from models.recompute import keeping, kept


class Linear(nn.Module):
    """y = x Wᵀ (+ b). x [..., inputs] -> [..., outputs] in x's dtype; the weight is cast to it at use.

    parts: of the outputs, where several matrices are in one, as q, k and v are (`models.axes.Declared`).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: tuple[str | None, str | None],
        bias: bool = False,
        init: Init | None = None,
        parts: tuple[int, ...] = (),
    ):
        super().__init__()
        self.weight = declare(outputs, inputs, axes=axes, init=init or fan_in(inputs), parts=parts)
        self.bias = (
            declare(outputs, axes=axes[:1], init=constant(0.0), decay=False, matrix=False, parts=parts)
            if bias
            else None
        )
        self.bias_share = 1.0  # that is added here, where several devices add up what they make of their inputs
        self.low: Any = None  # a recipe of few bits (`models.recipes.LowPrecision`)
        self.magnitudes: Magnitudes | None = None  # of earlier steps, where the recipe takes its scales from them

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if bias is not None and self.bias_share != 1.0:
            bias = bias * self.bias_share
        if self.low is not None:  # codes are made of the weight itself: a cast before would round twice
            low: Tensor = self.low.linear(x, self.weight, self.magnitudes)
            return low if bias is None else low + bias
        weight = self.weight if self.weight.dtype is x.dtype else self.weight.to(x.dtype)
        y: Tensor = _SavedLinear.apply(x, weight, bias) if keeping() else F.linear(x, weight, bias)
        return y


class _SavedLinear(torch.autograd.Function):
    """F.linear, whose result is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return kept(lambda: F.linear(x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            rows.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )
