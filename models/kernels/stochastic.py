"""Rounding to bf16 that is right on average: up or down at random, the likelier the nearer.

bf16 has 8 bits of mantissa. An update below 2^-9 of a weight is lost each time where the nearest value is taken: 1,000
additions of 1e-4 to 1 leave 1. Where one of them rounds up with probability 1e-4 / 2^-7, all make 1.1 on average.

The random bits are a function of (a parameter's number, the step, an element's place in the whole parameter): the same
on any layout, and in a run that goes on from a checkpoint.
"""

import torch
from torch import Tensor

_LOW, _GOLDEN = (1 << 16) - 1, 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # SplitMix64: Steele, Lea, Flood, OOPSLA 2014


def _signed(number: int) -> int:
    """A number of 64 bits as int64 has it."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def noise(stream: int, step: int, begin: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """int32 [count] in [0, 2^16), of the elements from `begin` on."""
    return noise_at(stream, step, torch.arange(begin, begin + count, device=device))


def noise_at(stream: int, step: int, places: Tensor) -> Tensor:
    """int32 [N] in [0, 2^16), of the elements at these places, int64 [N]."""
    z = places * _signed(_GOLDEN)
    z += _signed(stream + step * _MIX[0])
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return ((z >> 31) & _LOW).to(torch.int32)


def to_bf16(x: Tensor, random: Tensor) -> Tensor:
    """x fp32 [...] rounded to bf16 by `random` int32 [...] of 16 bits. Values that are not finite stay as they are."""
    up = ((x.view(torch.int32) + random) & ~_LOW).view(torch.float32)
    return torch.where(torch.isfinite(x), up, x).to(torch.bfloat16)
