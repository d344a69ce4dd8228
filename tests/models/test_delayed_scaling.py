"""Delayed scaling against Transformer Engine's rule, written out with numbers of Python's."""

import pytest
import torch
from torch import nn

from models import delayed_scaling
from models.delayed_scaling import Magnitudes
from models.kernels.grouped_ffn import grouped_linear, grouped_weight_gradient
from models.linear import Linear
from models.recipes import RECIPES, LowPrecision

E4M3, E5M2 = (torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)


def rounded(x: torch.Tensor, magnitude: float, code: tuple) -> torch.Tensor:
    """Multiplied by the largest code over the magnitude, cut off there, and back."""
    dtype, most = code
    scale = most / magnitude
    return (x * scale).clamp(-most, most).to(dtype).to(x.dtype) / scale


class Window:
    """The largest of the last `steps` steps; of the first step, the matrix's own."""

    def __init__(self, steps: int):
        self.steps, self.past = steps, []

    def magnitude(self, x: torch.Tensor) -> float:
        return max(self.past[-self.steps :], default=0.0) or x.abs().max().item()


def matrices(step: int) -> tuple[torch.Tensor, ...]:
    """x, W and g, whose sizes go up and down over the steps."""
    draw = torch.Generator().manual_seed(step)
    size = (1.0, 3.0, 0.5, 0.7, 0.4, 2.0)[step]
    shapes = ((48, 32), (64, 32), (48, 64))
    return tuple(size * torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in shapes)


def test_scales_are_of_the_largest_of_the_last_steps():
    layer, past = Linear(32, 64, axes=(None, None)).double(), Magnitudes(steps=2)
    layer.low, layer.magnitudes = LowPrecision(RECIPES["fp8_delayed"]), past
    windows = [Window(2) for _ in range(3)]
    for step in range(6):
        x, w, g = matrices(step)
        with torch.no_grad():
            layer.weight.copy_(w)
        layer.weight.grad = None
        x.requires_grad_()
        y = layer(x)
        y.backward(g)
        near = [
            rounded(t.detach(), window.magnitude(t), code)
            for t, window, code in zip((x, w, g), windows, (E4M3, E4M3, E5M2), strict=True)
        ]
        for got, want in (
            (y, near[0] @ near[1].T),
            (x.grad, near[2] @ near[1]),
            (layer.weight.grad, near[2].T @ near[0]),
        ):
            torch.testing.assert_close(got.detach(), want, rtol=1e-6, atol=1e-9)  # a magnitude is fp32
        for window, t in zip(windows, (x, w, g), strict=True):
            window.past.append(t.abs().max().item())
        with torch.no_grad():
            layer(100 * x)  # an evaluation is not counted
        seen = delayed_scaling.present(layer)
        delayed_scaling.settle(layer, seen)
    assert past.past.shape == (3, 2) and past.known


def test_a_step_that_is_held_back_and_numbers_that_are_not_finite_leave_no_magnitude():
    layer = Linear(32, 32, axes=(None, None))
    nn.init.ones_(layer.weight)
    layer.low, layer.magnitudes = LowPrecision(RECIPES["fp8_delayed"]), Magnitudes()
    layer(torch.full((16, 32), 5.0, requires_grad=True)).sum().backward()
    delayed_scaling.forget(layer)
    assert not delayed_scaling.present(layer).any()
    layer(torch.ones(16, 32, requires_grad=True)).sum().backward()
    delayed_scaling.settle(layer, delayed_scaling.present(layer))
    assert layer.magnitudes.past[:, 0].tolist() == [1.0, 1.0, 1.0]
    x = torch.ones(16, 32)
    x[3, 4] = torch.inf
    assert layer(x).isnan().all()  # codes would have cut it off at 448
    delayed_scaling.settle(layer, delayed_scaling.present(layer))
    assert layer.magnitudes.past[0, :2].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_share_a_scale_and_are_multiplied_at_once(dtype):
    draw = torch.Generator().manual_seed(4)
    rows, weight, grad = (
        torch.randn(*shape, dtype=dtype, generator=draw) for shape in ((21, 32), (3, 32, 16), (21, 16))
    )
    offsets, low, past = torch.tensor([5, 5, 21], dtype=torch.int32), LowPrecision(RECIPES["fp8_delayed"]), Magnitudes()
    past.settle(torch.tensor([2.0, 3.0, 1.5]))
    rows.requires_grad_(), weight.requires_grad_()
    y = low.grouped(rows, weight, offsets, past)
    y.backward(grad)
    x, w, g = rounded(rows.detach(), 2.0, E4M3), rounded(weight.detach(), 3.0, E4M3), rounded(grad, 1.5, E5M2)
    parts = [(x[:5], w[0], g[:5]), (x[5:], w[2], g[5:])]
    torch.testing.assert_close(y.detach(), torch.cat([a @ b for a, b, _ in parts]))
    torch.testing.assert_close(rows.grad, torch.cat([c @ b.T for _, b, c in parts]))
    torch.testing.assert_close(weight.grad[0], parts[0][0].T @ parts[0][2])
    torch.testing.assert_close(weight.grad[2], parts[1][0].T @ parts[1][2])
    assert not weight.grad[1].any()
    torch.testing.assert_close(
        past.present, torch.stack([t.detach().abs().max() for t in (rows, weight, grad)]).float()
    )


def test_the_gradient_of_grouped_weights_is_that_of_autograd():
    rows, weight, grad = torch.randn(11, 8), torch.randn(4, 8, 12, requires_grad=True), torch.randn(11, 12)
    offsets = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    grouped_linear(rows, weight, offsets).backward(grad)
    torch.testing.assert_close(grouped_weight_gradient(rows, grad, offsets), weight.grad)
