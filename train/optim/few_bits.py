"""Moments of few bits: a number of 8 or 4 bits for each weight, and a scale for each block of a row.

A block's scale is the element of largest magnitude, sign and all, so that it has a code of its own, 1. Decoding and
encoding again therefore changes nothing, and a checkpoint, which has moments in fp32, continues a run bit by bit.
Blocks never reach over rows: ranks that hold other rows of a weight have the same blocks.
"""

import math
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

MomentFormat = Literal["fp32", "bf16", "int8", "fp8", "int4"]
FORMATS = get_args(MomentFormat)
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "fp8": 8, "int4": 4}
BLOCK = {"int8": 256, "fp8": 256, "int4": 128}


@cache
def codebook(format: str, signed: bool) -> Tensor:
    """The values of the codes, fp32, ascending, 1 the last.

    int8: dynamic exponents (8-bit optimizers, 2110.02861). int4: the same of 4 bits for means, and sixteenths without 0
    for squares, whose root divides (2309.01507). fp8: E4M3, of the roots of squares, divided by its largest.
    """
    if format == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = values[values.isfinite()].unique() / 448
        return values if signed else values[values >= 0]
    bits = BITS[format]
    if format == "int4" and not signed:
        return torch.arange(1, 17) / 16
    found, exponents = [0.0, 1.0], bits - 1
    for i in range(exponents):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i + 1 - exponents)
        found += middles.tolist() + ([-x for x in middles.tolist()] if signed else [])
    return torch.tensor(sorted(found)).float()


class FewBits(NamedTuple):
    """A moment of shape [..., K] as codes uint8, two in one for 4 bits, and scales fp32 [rows, blocks]."""

    codes: Tensor
    scale: Tensor


def encode_moment(x: Tensor, format: str, *, signed: bool) -> FewBits:
    """x fp32 [..., K]."""
    rows, block = x.reshape(-1, x.shape[-1]), BLOCK[format]
    rows = rows.sqrt() if format == "fp8" and not signed else rows
    blocks = F.pad(rows, (0, -rows.shape[1] % block)).view(len(rows), -1, block)
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    values = codebook(format, signed).to(x.device)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(torch.where(scale == 0, 0.0, blocks / scale), middles).to(torch.uint8)
    if BITS[format] == 4:
        codes = codes[..., ::2] << 4 | codes[..., 1::2]
    return FewBits(codes, scale.squeeze(-1))


def decode_moment(moment: FewBits, format: str, shape: torch.Size, *, signed: bool) -> Tensor:
    """fp32 of that shape."""
    codes = moment.codes
    if BITS[format] == 4:
        codes = torch.stack([codes >> 4, codes & 15], -1).flatten(-2)
    values = codebook(format, signed).to(codes.device)[codes.int()] * moment.scale.unsqueeze(-1)
    rows = values.flatten(-2)[:, : shape[-1]]
    rows = rows.square() if format == "fp8" and not signed else rows
    return rows.reshape(shape)


def numbers(format: str, shape: torch.Size) -> float:
    """Bits of a moment of that shape in multiples of 32, scales included."""
    if format not in BLOCK:
        return math.prod(shape) * BITS[format] / 32
    blocks = math.prod(shape[:-1]) * -(-shape[-1] // BLOCK[format])
    return blocks * (BLOCK[format] * BITS[format] / 32 + 1)
