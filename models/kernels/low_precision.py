"""Products of matrices of few bits: how values get a scale and become codes, and what the codes' product is.

A format of 8 bits has some 20 binary orders of magnitude (E4M3 from 2^-9 to 448) or fewer (int8), a tensor has more.
So values that lie together share a scale, which brings the largest of them to the largest code; the smaller the share
that one outlier spoils, the less is lost. Four rows of 256 that are 1e5 times as large as the others, with one scale
for all: the others lie below 448 / 1e5 = 2^-7.8, where E4M3 has two codes left, and half of what they say is gone.
With a scale a row nothing is.

Scales lie along the dimension that a product sums over, since only then they come out of the sum: those of x Wᵀ along
the inputs, those of gᵀ x, the weight's gradient, along the tokens. So x gets other codes in the one than in the other.

`product` has two ways. Emulated: the codes' values are multiplied in fp32 (fp64 where it is given fp64), or in 16 bits
where the scales are powers of two, which makes the values exact there. Native: torch's scaled product of codes, where
the device has one.

Legend: R rows, K what is summed over, M rows of the first and N of the second matrix of a product.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.precision import wide

E4M3, E5M2, INT8, INT4, BF16 = "e4m3", "e5m2", "int8", "int4", "bf16"
DTYPES = {
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
    INT8: torch.int8,
    INT4: torch.int8,
    BF16: torch.bfloat16,
}
LARGEST = {E4M3: 448.0, E5M2: 57344.0, INT8: 127.0, INT4: 7.0, BF16: torch.finfo(torch.bfloat16).max}
SMALLEST = 2.0**-126  # scale: a smaller one would not be normal in fp32, and may be flushed to 0

Share = Callable[[Tensor], Tensor]


class Scaling(NamedTuple):
    """A format, and the values that share a scale: this many rows by so many columns of them, 0 for all.

    power: scales are powers of two, rounded up. BF16 has the range of fp32, and its scales are 1.
    """

    format: str
    rows: int
    columns: int
    power: bool = False


class Codes(NamedTuple):
    """codes [R, K], and scale in fp32 or fp64, one for each share: a value is its code times its share's scale."""

    codes: Tensor
    scale: Tensor
    scaling: Scaling

    def transposed(self) -> "Codes":
        """[K, R]: the same values, shared as before."""
        rows, columns = self.scaling.rows, self.scaling.columns
        return Codes(self.codes.T, self.scale.T, self.scaling._replace(rows=columns, columns=rows))

    def values(self, dtype: torch.dtype) -> Tensor:
        """[R, K] in `dtype`."""
        if self.scaling.format == BF16:
            return self.codes.to(dtype)
        return (self.codes.to(self.scale.dtype) * beside(self.scale, self.scaling, self.codes.shape)).to(dtype)


def shares(shape: torch.Size, scaling: Scaling) -> tuple[int, int]:
    """The number of shares along rows and columns; one of what is empty."""
    (R, K), rows, columns = shape, scaling.rows, scaling.columns
    return max(1, -(-R // rows)) if rows else 1, max(1, -(-K // columns)) if columns else 1


def largest(x: Tensor, scaling: Scaling) -> Tensor:
    """The largest magnitude of each share of x [R, K], [shares of R, shares of K]; 0 of an empty one."""
    (R, K), rows, columns = x.shape, scaling.rows or max(len(x), 1), scaling.columns or max(x.shape[1], 1)
    down, across = shares(x.shape, scaling)
    if (missing := (down * rows - R, across * columns - K)) != (0, 0):
        x = F.pad(x, (0, missing[1], 0, missing[0]))
    return x.view(down, rows, across, columns).abs().amax((1, 3))


def encode(x: Tensor, scaling: Scaling, share: Share | None = None) -> Codes:
    """x [R, K] as codes. share: makes the largest magnitudes of this rank's shares those of several ranks'.

    A share with a value that is not finite has a scale that is not, so that all products with it say so.
    """
    x = wide(x)
    magnitude = largest(x, scaling)
    if share is not None:
        magnitude = share(magnitude)
    scale = scales(magnitude, scaling)
    return Codes(cast(x / beside(scale, scaling, x.shape), scaling), scale, scaling)


def scales(magnitude: Tensor, scaling: Scaling) -> Tensor:
    """The scale of each share, of its largest magnitude; nan where that is not finite."""
    scale = (magnitude / LARGEST[scaling.format]).clamp_min(SMALLEST)
    if scaling.format == BF16:
        scale = torch.ones_like(magnitude)
    elif scaling.power:
        fraction, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (fraction == 0.5).to(exponent.dtype))
    return torch.where(torch.isfinite(magnitude), scale, torch.nan)


def cast(scaled: Tensor, scaling: Scaling) -> Tensor:
    """Values divided by their scales, to the nearest codes."""
    most, dtype = LARGEST[scaling.format], DTYPES[scaling.format]
    if scaling.format == BF16:
        return scaled.to(dtype)
    scaled = scaled.clamp(-most, most)
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype)


def beside(scale: Tensor, scaling: Scaling, shape: torch.Size) -> Tensor:
    """Scales in a shape that multiplies [R, K]."""
    if scaling.columns:
        scale = scale.repeat_interleave(scaling.columns, 1)[:, : shape[1]]
    if scaling.rows > 1:
        scale = scale.repeat_interleave(scaling.rows, 0)[: shape[0]]
    return scale


def rounded(x: Tensor, scaling: Scaling) -> Tensor:
    """x [R, K] as its codes have it, in x's dtype."""
    return encode(x, scaling).values(x.dtype)


def product(a: Codes | Tensor, b: Codes | Tensor, dtype: torch.dtype, *, native: bool = False) -> Tensor:
    """a [M, K] times the transpose of b [N, K]: [M, N] in `dtype`, summed in fp32 or better."""
    if native and isinstance(a, Codes) and isinstance(b, Codes) and a.codes.numel() and b.codes.numel():
        return _native(a, b, dtype)
    exact = all(not isinstance(x, Codes) or x.scaling.power for x in (a, b))
    inner = dtype if exact else torch.promote_types(dtype, torch.float32)
    first, second = (x.values(inner) if isinstance(x, Codes) else x.to(inner) for x in (a, b))
    return (first @ second.T).to(dtype)


@cache
def block_kernels() -> Any:
    """`models.kernels.blockwise_triton`; None without Triton."""
    try:
        from models.kernels import blockwise_triton
    except ImportError:
        return None
    return blockwise_triton


def encode_blocks(x: Tensor, scaling: Scaling) -> Codes:
    """`encode` by one Triton kernel, for scales of 128 values of a row or of 128 x 128."""
    codes, scale = block_kernels().encode(x, scaling.rows > 1)
    return Codes(codes, scale, scaling)


def _native(a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    """By the device's own product of codes, a scale a tensor or a row, or by Triton's, a scale a block. K is padded to
    what the first takes."""
    if a.scaling.columns:
        parts = (x.contiguous() for x in (a.codes, a.scale.float(), b.codes, b.scale.float()))
        by_blocks: Tensor = block_kernels().product(*parts, b.scaling.rows, dtype)
        return by_blocks
    padding = -a.codes.shape[1] % 16
    first, second = (x.codes.contiguous() for x in (a, b))  # CUDA takes rows of both, and a gradient's are columns
    if padding:  # of bytes: nothing pads the formats of 8 bits
        first, second = (F.pad(x.view(torch.uint8), (0, padding)).view(x.dtype) for x in (first, second))
    if a.codes.dtype is torch.int8:
        return (torch._int_mm(first, second.T).to(a.scale.dtype) * a.scale * b.scale.T).to(dtype)
    by, of = a.scale.float(), b.scale.float().T
    if by.numel() == of.numel() == 1:
        by, of = by.view(()), of.view(())
    else:
        by, of = by.expand(len(first), 1).contiguous(), of.expand(1, len(second)).contiguous()
    made = torch.float32 if dtype == torch.float64 else dtype
    return torch._scaled_mm(first, second.T, by, of, out_dtype=made).to(dtype)
