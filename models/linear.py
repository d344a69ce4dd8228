"""Every matmul with a weight goes through here: fp32 master weights, multiplied in the dtype of the activations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.axes import Init, constant, declare, fan_in
from models.delayed_scaling import Magnitudes
from models.recompute import keeping, kept

TOGETHER = ("cuda",)  # devices on which casts of many tensors are one kernel


class _Cast(torch.autograd.Function):
    """Tensors in another dtype, and their gradients back in their own, by one operator each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [x.dtype for x in xs]
        ys = [torch.empty_like(x, dtype=dtype) for x in xs]
        torch._foreach_copy_(ys, xs)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [
            None if grad is None else torch.empty_like(grad, dtype=dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        if wider := [x for x in found if x is not None]:
            torch._foreach_copy_(wider, [grad for grad in grads if grad is not None])
        return None, *found


def cast(xs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another dtype, by one kernel where the device has one for all."""
    if not xs or xs[0].device.type not in TOGETHER:
        return [x.to(dtype) for x in xs]
    others = [x for x in xs if x.dtype != dtype]
    made = iter(_Cast.apply(dtype, *others)) if others else iter(())
    return [x if x.dtype == dtype else next(made) for x in xs]


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
        self.casts = True  # whether it multiplies in the dtype of the layer
        self.ready: dict[str, Tensor] = {}  # weight and bias in that dtype, while the layer runs

    def _in(self, dtype: torch.dtype, name: str) -> Tensor:
        ready = self.ready.get(name)
        own: Tensor = getattr(self, name)
        if ready is not None and ready.dtype == dtype:
            return ready
        return own if own.dtype is dtype else own.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self._in(x.dtype, "bias")
        if bias is not None and self.bias_share != 1.0:
            bias = bias * self.bias_share
        if self.low is not None:  # codes are made of the weight itself: a cast before would round twice
            low: Tensor = self.low.linear(x, self.weight, self.magnitudes)
            return low if bias is None else low + bias
        weight = self._in(x.dtype, "weight")
        y: Tensor = _SavedLinear.apply(x, weight, bias) if keeping() else F.linear(x, weight, bias)
        return y


@contextmanager
def cast_together(linears: list[Linear], x: Tensor) -> Iterator[None]:
    """Within it, these multiply x by weights that were cast to its dtype together, where its device can do that."""
    if x.device.type not in TOGETHER or not linears:
        yield
        return
    named = [(linear, name) for linear in linears for name in ("weight", "bias") if _is_cast(linear, name, x.dtype)]
    for (linear, name), ready in zip(named, cast([getattr(*each) for each in named], x.dtype), strict=True):
        linear.ready[name] = ready
    try:
        yield
    finally:
        for linear, _ in named:
            linear.ready.clear()


def _is_cast(linear: Linear, name: str, dtype: torch.dtype) -> bool:
    """Says whether the layer casts a plain weight of its own. One that is shared out, or travels as codes, is not."""
    own: Tensor | None = getattr(linear, name)
    plain = own is not None and not hasattr(own, "__tensor_flatten__") and own.dtype != dtype
    return plain and linear.casts and linear.low is None


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
