"""The short convolution of `models.kernels.conv` as Triton kernels: one launch forward, three backward.

Taps that reach over the start of a document are not loaded. Products and sums are in fp32; fp64 is the reference's.
Backward, one kernel computes the pre-activation again and gives its gradient, and what each block of tokens adds to the
gradients of taps and bias; these are then summed in one order, so that equal runs give equal gradients. Another kernel
brings the gradient to the inputs.

Legend: B spans, T tokens, D channels, W taps, P = W - 1 + T inputs with those before the span, N blocks of tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS, CHANNELS = 16, 64  # of a block: eight elements a thread, or registers spill


@triton.jit
def pre_activation(x, taps, bias, place, t, d, inside, D, W: tl.constexpr, BIASED: tl.constexpr):
    """Σ_j taps_j x_{t-j} + bias of a block, fp32; x: the inputs of its span."""
    total = tl.zeros(inside.shape, tl.float32)
    for j in tl.static_range(W):
        tap = tl.load(taps + j * D + d, mask=d < D, other=0.0)
        seen = inside & (place[:, None] >= j)
        met = tl.load(x + (t[:, None] + (W - 1 - j)) * D + d[None, :], mask=seen, other=0.0)
        total += met.to(tl.float32) * tap[None, :]
    if BIASED:
        total += tl.load(bias + d, mask=d < D, other=0.0)[None, :]
    return total


@triton.jit
def forward_kernel(
    x, taps, bias, positions, y, T, D, W: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (t[:, None] < T) & (d[None, :] < D)
    place = tl.load(positions + row * T + t, mask=t < T, other=0)
    total = pre_activation(x + row * (T + W - 1) * D, taps, bias, place, t, d, inside, D, W, BIASED)
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(y + (row * T + t[:, None]) * D + d[None, :], total, mask=inside)


@triton.jit
def gradient_kernel(
    x, taps, bias, positions, grad, inner, parts, T, D, W: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """inner [B, T, D]: the gradient of the pre-activation, fp32. parts [N, W + 1, D]: of taps, and of the bias."""
    row = tl.program_id(2).to(tl.int64)
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (t[:, None] < T) & (d[None, :] < D)
    place = tl.load(positions + row * T + t, mask=t < T, other=0)
    x += row * (T + W - 1) * D
    at = (row * T + t[:, None]) * D + d[None, :]
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        total = pre_activation(x, taps, bias, place, t, d, inside, D, W, BIASED)
        share = tl.sigmoid(total)
        g = g * share * (1 + total * (1 - share))
    tl.store(inner + at, g, mask=inside)
    parts += (row * tl.num_programs(0) + tl.program_id(0)) * (W + 1) * D
    for j in tl.static_range(W):
        seen = inside & (place[:, None] >= j)
        met = tl.load(x + (t[:, None] + (W - 1 - j)) * D + d[None, :], mask=seen, other=0.0).to(tl.float32)
        tl.store(parts + j * D + d, tl.sum(g * met, 0), mask=d < D)
    tl.store(parts + W * D + d, tl.sum(g, 0), mask=d < D)


@triton.jit
def input_kernel(
    inner, taps, positions, dx, T, D, W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """dx [B, P, D]: Σ_j taps_j of the gradients of the tokens whose tap j meets the input."""
    row = tl.program_id(2).to(tl.int64)
    p = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for j in tl.static_range(W):
        t = p - (W - 1) + j
        there = (t >= 0) & (t < T)
        place = tl.load(positions + row * T + t, mask=there, other=-1)
        seen = (there & (place >= j))[:, None] & (d[None, :] < D)
        tap = tl.load(taps + j * D + d, mask=d < D, other=0.0)
        total += tl.load(inner + (row * T + t[:, None]) * D + d[None, :], mask=seen, other=0.0) * tap[None, :]
    inside = (p[:, None] < T + W - 1) & (d[None, :] < D)
    tl.store(dx + (row * (T + W - 1) + p[:, None]) * D + d[None, :], total, mask=inside)


def _grid(tokens: int, D: int, B: int) -> tuple[int, int, int]:
    return triton.cdiv(tokens, TOKENS), triton.cdiv(D, CHANNELS), B


class Conv(torch.autograd.Function):
    """As `models.kernels.conv.conv`; taps [W, D] and bias [D] fp32, x [B, P, D] of `DTYPES`."""

    @staticmethod
    def forward(
        ctx: Any, x_BPD: Tensor, taps_WD: Tensor, bias_D: Tensor | None, positions_BT: Tensor, silu: bool
    ) -> Tensor:
        x_BPD, positions_BT = x_BPD.contiguous(), positions_BT.contiguous()
        (B, T), (W, D) = positions_BT.shape, taps_WD.shape
        y_BTD = x_BPD.new_empty((B, T, D))
        biased, bias = bias_D is not None, taps_WD if bias_D is None else bias_D
        forward_kernel[_grid(T, D, B)](
            x_BPD, taps_WD, bias, positions_BT, y_BTD, T, D, W, biased, silu, TOKENS, CHANNELS
        )
        ctx.save_for_backward(x_BPD, taps_WD, bias, positions_BT)
        ctx.biased, ctx.silu = biased, silu
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        x_BPD, taps_WD, bias_D, positions_BT = ctx.saved_tensors
        (B, T), (W, D) = positions_BT.shape, taps_WD.shape
        grid = _grid(T, D, B)
        inner_BTD = torch.empty((B, T, D), dtype=torch.float32, device=x_BPD.device)
        parts_NWD = inner_BTD.new_empty((grid[0] * B, W + 1, D))
        gradient_kernel[grid](
            x_BPD, taps_WD, bias_D, positions_BT, grad_BTD.contiguous(), inner_BTD, parts_NWD, T, D, W, ctx.biased,
            ctx.silu, TOKENS, CHANNELS,
        )  # fmt: skip
        dx_BPD = torch.empty_like(x_BPD)
        input_kernel[_grid(T + W - 1, D, B)](inner_BTD, taps_WD, positions_BT, dx_BPD, T, D, W, TOKENS, CHANNELS)
        parts_WD = parts_NWD.sum(0)
        return dx_BPD, parts_WD[:W], parts_WD[W] if ctx.biased else None, None, None
