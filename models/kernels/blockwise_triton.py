"""FP8 in blocks as Triton kernels: a matrix becomes codes in one launch, codes are multiplied in another.

A scale is shared by 128 values of a row, or by 128 x 128 of a weight, and lies along what a product sums over
(DeepSeek-V3, 2412.19437, section 3.3). So a step of 128 of the sum is a product of codes, which is then multiplied by
both scales and added up in fp32: no more than 128 products are summed by the matrix units alone, whose sums of FP8 keep
fewer bits than fp32. Codes and scales are those of `models.kernels.low_precision`. FP8 of this format needs
compute capability 9.0 here.

Legend: R rows, K what is summed over, M rows of the first and N of the second matrix of a product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # values along the sum that share a scale
CAPABILITY = (9, 0)  # of an NVIDIA GPU, from which on Triton multiplies float8e4nv
ROWS = 16  # of a block of rows that have scales of their own
TILE_M, TILE_N = 64, 64
LARGEST = tl.constexpr(448.0)
SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def _nearest(x):
    """x to the nearest number of E4M3, ties to even: three bits behind the first, and multiples of 2^-9 below 2^-6.

    The cast that follows is then exact, however it rounds; Triton's interpreter cuts off."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1)) & -0x100000
    small = (tl.abs(x) + 24576.0) - 24576.0  # 1.5 * 2^14, whose last bit is 2^-9
    near = tl.where(tl.abs(x) < 0.015625, small.to(tl.int32, bitcast=True), normal)
    return (near | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def encode_kernel(
    x, codes, scale, R, K, along_r, along_k, ROWS: tl.constexpr, BLOCK: tl.constexpr, SQUARE: tl.constexpr
):  # fmt: skip
    """codes [R, K] contiguous, scale [R or R / ROWS, K / BLOCK] fp32; x by its strides, as it may be transposed."""
    i, j = tl.program_id(0), tl.program_id(1)
    r = (i * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (r[:, None] < R) & (k[None, :] < K)
    met = tl.load(x + r[:, None] * along_r + k[None, :] * along_k, mask=inside, other=0.0).to(tl.float32)
    size = tl.where(met == met, tl.abs(met), float("inf"))  # a maximum would pass over what is no number
    most = tl.max(size, 1)
    if SQUARE:
        most = tl.zeros((ROWS,), tl.float32) + tl.max(most, 0)
    by = tl.maximum(tl.div_rn(most, LARGEST), SMALLEST)
    scaled = tl.div_rn(met, tl.zeros((ROWS, BLOCK), tl.float32) + by[:, None])
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    tl.store(codes + r[:, None] * K + k[None, :], _nearest(scaled).to(tl.float8e4nv), mask=inside)
    by = tl.where(most < float("inf"), by, float("nan"))
    columns = tl.num_programs(1)
    if SQUARE:
        tl.store(scale + i * columns + j, tl.max(tl.where(by == by, by, float("inf")), 0))
    else:
        tl.store(scale + r * columns + j, by, mask=r < R)


@triton.jit
def product_kernel(
    a, b, a_scale, b_scale, out, M, N, K, SHARED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [M, N] = a [M, K] b [N, K]ᵀ. SHARED: rows of b that share a scale."""
    m = (tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    n = (tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)
    blocks = tl.cdiv(K, BLOCK)
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for block in range(0, blocks):
        k = block * BLOCK + tl.arange(0, BLOCK)
        first = tl.load(a + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        second = tl.load(b + n[None, :] * K + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        by = tl.load(a_scale + m * blocks + block, mask=m < M, other=0.0)
        of = tl.load(b_scale + (n // SHARED) * blocks + block, mask=n < N, other=0.0)
        total += tl.dot(first, second) * by[:, None] * of[None, :]
    tl.store(out + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))


def encode(x_RK: Tensor, square: bool) -> tuple[Tensor, Tensor]:
    """Codes [R, K] in E4M3, and scales in fp32, [R, K / 128] or, where square, [R / 128, K / 128], rounded up.

    x: fp32 or 16 bits, of any strides. A share with a value that is not finite has a scale that is no number.
    """
    R, K = x_RK.shape
    rows = BLOCK if square else ROWS
    codes = torch.empty((R, K), dtype=torch.float8_e4m3fn, device=x_RK.device)
    grid = (triton.cdiv(R, rows), triton.cdiv(K, BLOCK))
    scale = torch.empty((grid[0] if square else R, grid[1]), dtype=torch.float32, device=x_RK.device)
    encode_kernel[grid](x_RK, codes, scale, R, K, *x_RK.stride(), rows, BLOCK, square, num_warps=8 if square else 4)
    return codes, scale


def product(a_MK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """a bᵀ [M, N] in `dtype`, of contiguous codes. shared: rows of b that share a scale, 1 or 128; of a none do."""
    (M, K), N = a_MK.shape, len(b_NK)
    out = torch.empty((M, N), dtype=dtype, device=a_MK.device)
    grid = (triton.cdiv(M, TILE_M), triton.cdiv(N, TILE_N))
    product_kernel[grid](a_MK, b_NK, a_scale, b_scale, out, M, N, K, shared, TILE_M, TILE_N, BLOCK)
    return out
