"""Keys and values in 8 bits, on their way and to whoever attends to them.

A key, or a value, of one token and head shares a scale, a power of two; so a message has a byte a channel and one more
for the exponent, and no rounding of its own: what comes out of it is what went in, in fp64, fp32 and bf16 alike. The
rounding happens before, once, to a rank's own keys too: then it does not matter who holds which span, and the loss is
the same on any number of ranks that share a sequence. Gradients pass by the rounding, and travel as wide as ever.

Two ranks, head width 128: a token and head is 258 bytes in place of 512 in bf16 and 1,024 in fp32.
"""

from typing import Any, get_args

import torch
from torch import Tensor

from models.kernels.low_precision import E4M3, INT8, Codes, Scaling, encode
from models.precision import wide
from parallel.schedule.comm_volume import KeyFormatName

FORMATS = {"fp8": Scaling(E4M3, 1, 0, power=True), "int8": Scaling(INT8, 1, 0, power=True)}
BIAS, NOT_FINITE = 127, 255  # as in E8M0: a byte is the exponent of a scale from 2^-127 on, the last for none


class _Rounded(torch.autograd.Function):
    """x [..., W] as a format has it, in x's dtype; its gradient is that of what is rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: Scaling) -> Tensor:
        return encode(x.reshape(-1, x.shape[-1]), scaling).values(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class KeyCodec:
    """A format of keys and values, and its messages. name: exact for none."""

    def __init__(self, name: KeyFormatName = "exact"):
        if name not in get_args(KeyFormatName):
            raise ValueError(f"parallel.transport.keys={name}: must be one of {', '.join(get_args(KeyFormatName))}")
        self.scaling = FORMATS.get(name)

    def rounded(self, x: Tensor) -> Tensor:
        """x [..., W] in its own dtype."""
        if self.scaling is None or not x.numel():
            return x
        y: Tensor = _Rounded.apply(x, self.scaling)
        return y

    def packed(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        """Rounded numbers [..., Σ widths] as bytes [..., Σ (width + 1)], each part with a scale of its own."""
        if self.scaling is None:
            return x
        parts = []
        for part in x.split(widths, dim=-1):
            codes = encode(part.reshape(-1, part.shape[-1]), self.scaling)
            _, exponent = torch.frexp(codes.scale)  # of 2^e: one half, and e + 1
            byte = torch.where(codes.scale.isfinite(), exponent.long() - 1 + BIAS, NOT_FINITE)
            both = torch.cat((codes.codes.view(torch.uint8), byte.to(torch.uint8)), dim=-1)
            parts.append(both.view(*part.shape[:-1], -1))
        return torch.cat(parts, dim=-1)

    def like(self, x: Tensor, shape: tuple[int, ...], widths: tuple[int, ...]) -> Tensor:
        """An empty message about so many rows of numbers like x's."""
        if self.scaling is None:
            return x.new_empty((*shape, sum(widths)))
        return x.new_empty((*shape, sum(widths) + len(widths)), dtype=torch.uint8)

    def unpacked(self, message: Tensor, widths: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The numbers of a message, [..., Σ widths] in `dtype`. Bytes that are all zero are zeros."""
        if self.scaling is None:
            return message
        parts, inner = [], wide(torch.empty(0, dtype=dtype)).dtype
        kind = torch.float8_e4m3fn if self.scaling.format == E4M3 else torch.int8
        for part in message.split([width + 1 for width in widths], dim=-1):
            rows = part.reshape(-1, part.shape[-1])
            byte = rows[:, -1:].to(torch.int32)
            scale = torch.ldexp(torch.ones_like(byte, dtype=inner), byte - BIAS)
            scale = torch.where(byte == NOT_FINITE, torch.nan, scale)
            codes = Codes(rows[:, :-1].contiguous().view(kind), scale, self.scaling)
            parts.append(codes.values(dtype).view(*part.shape[:-1], -1))
        return torch.cat(parts, dim=-1)


EXACT = KeyCodec()
