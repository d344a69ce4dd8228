"""A short causal depthwise convolution, forward and backward, a tile of tokens at a time.

Each tap is a product and a sum of all elements. Over the whole sequence that is a pass through memory for each of them
and for each of their gradients; over a tile that fits in the cache it is one. The backward pass computes the tile's
pre-activation again, so that only the inputs are kept.

Taps that reach over the start of a document are left out, not subtracted: nothing of another document enters, not even
as rounding. Tiles in which no document starts need no mask. On CUDA it is one kernel (`models.kernels.conv_triton`).

Legend: B spans, T tokens, D channels, W taps, P = W - 1 + T inputs with those before the span, N tokens of a tile.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.registry import TRITON
from models.precision import wide

TILE = 1 << 16  # elements: 256 KiB in fp32, of which a core's cache holds several


class _Tile(NamedTuple):
    """Tokens [begin, end) of all spans."""

    begin: int
    end: int
    positions: Tensor | None  # [B, N, 1] in the document; None where no tap reaches over a start

    def tap(self, x_BPD: Tensor, width: int, j: int) -> Tensor:
        """The inputs that tap j meets, a view [B, N, D]."""
        return x_BPD[:, width - 1 - j + self.begin : width - 1 - j + self.end]

    def inside(self, x_BND: Tensor, j: int) -> Tensor:
        """x, zero for the tokens whose tap j would meet another document, whatever lies there."""
        return x_BND if not j or self.positions is None else x_BND.masked_fill(self.positions < j, 0.0)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BPD: Tensor, taps_WD: Tensor, bias_D: Tensor | None, positions_BT: Tensor, silu: bool
    ) -> Tensor:
        B, T = positions_BT.shape
        y_BTD = x_BPD.new_empty((B, T, x_BPD.shape[-1]))
        for tile in _tiles(x_BPD, positions_BT, len(taps_WD)):
            y_BND = _tile(x_BPD, taps_WD, bias_D, tile)
            y_BTD[:, tile.begin : tile.end] = F.silu(y_BND, inplace=True) if silu else y_BND
        ctx.save_for_backward(x_BPD, taps_WD, bias_D, positions_BT)
        ctx.silu = silu
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        x_BPD, taps_WD, bias_D, positions_BT = ctx.saved_tensors
        width = len(taps_WD)
        dx_BPD, dtaps_WD = torch.zeros_like(wide(x_BPD)), torch.zeros_like(taps_WD)
        dbias_D = None if bias_D is None else torch.zeros_like(bias_D)
        for tile in _tiles(x_BPD, positions_BT, width):
            g_BND = wide(grad_BTD[:, tile.begin : tile.end])
            if ctx.silu:
                g_BND = torch.ops.aten.silu_backward(g_BND, _tile(x_BPD, taps_WD, bias_D, tile))
            if dbias_D is not None:
                dbias_D += g_BND.sum((0, 1))
            for j in range(width):
                tile.tap(dx_BPD, width, j).addcmul_(tile.inside(g_BND, j), taps_WD[j])
                dtaps_WD[j] += (g_BND * tile.inside(tile.tap(x_BPD, width, j), j)).sum((0, 1))
        return dx_BPD.to(x_BPD.dtype), dtaps_WD, dbias_D, None, None


def conv(x_BPD: Tensor, taps_WD: Tensor, bias_D: Tensor | None, positions_BT: Tensor, *, silu: bool) -> Tensor:
    """silu(Σ_j taps_j x_{t-j} + bias), j from 0 to the token's position in its document: [B, T, D] in x's dtype.

    x: the span's inputs behind the W - 1 before it. taps: tap 0 meets the token itself. Sums are in at least fp32.
    """
    if x_BPD.device.type in TRITON and (kernels := _kernels()) is not None and x_BPD.dtype in kernels.DTYPES:
        return kernels.Conv.apply(x_BPD, wide(taps_WD), None if bias_D is None else wide(bias_D), positions_BT, silu)
    return _Conv.apply(x_BPD, wide(taps_WD), None if bias_D is None else wide(bias_D), positions_BT, silu)


def conv_token(before_BWD: Tensor, x_B1D: Tensor, weight_DW: Tensor, bias_D: Tensor | None, *, silu: bool) -> Tensor:
    """The same for one token [B, 1, D], W - 1 inputs behind which there is nothing of another document: zeros stand
    for what is not. weight: tap j in column j. Without a gradient."""
    taps_WD = wide(weight_DW).t()
    y_BD = wide(x_B1D[:, 0]) * taps_WD[0]
    for j, x_BD in enumerate(reversed(wide(before_BWD).unbind(1)), start=1):
        y_BD.addcmul_(x_BD, taps_WD[j])
    if bias_D is not None:
        y_BD.add_(wide(bias_D))
    return (F.silu(y_BD, inplace=True) if silu else y_BD).to(x_B1D.dtype).unsqueeze(1)


@cache
def _kernels() -> Any:
    """`models.kernels.conv_triton`; None without Triton."""
    try:
        from models.kernels import conv_triton
    except ImportError:
        return None
    return conv_triton


def _tile(x_BPD: Tensor, taps_WD: Tensor, bias_D: Tensor | None, tile: _Tile) -> Tensor:
    """The pre-activation [B, N, D] of a tile."""
    width = len(taps_WD)
    y_BND = wide(tile.tap(x_BPD, width, 0)) * taps_WD[0]
    for j in range(1, width):
        y_BND.addcmul_(tile.inside(wide(tile.tap(x_BPD, width, j)), j), taps_WD[j])
    return y_BND if bias_D is None else y_BND.add_(bias_D)


def _tiles(x_BPD: Tensor, positions_BT: Tensor, width: int) -> Iterator[_Tile]:
    """All tokens, in order. On CUDA one tile, and no question that the host would wait for."""
    B, T = positions_BT.shape
    if x_BPD.device.type != "cpu":
        yield _Tile(0, T, positions_BT.unsqueeze(-1))
        return
    size = max(1, TILE // (B * x_BPD.shape[-1]))
    near_T = (positions_BT < width - 1).any(0)
    masked = [bool(part.any()) for part in near_T.split(size)]
    for begin, is_masked in zip(range(0, T, size), masked, strict=True):
        end = min(begin + size, T)
        yield _Tile(begin, end, positions_BT[:, begin:end].unsqueeze(-1) if is_masked else None)
