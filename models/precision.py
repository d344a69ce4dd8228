"""Promote, never demote: states, decays, norms and softmaxes are fp32 or better, whatever dtype the matmuls use."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in at least fp32 (`.float()` would demote fp64, which the parity tests run in)."""
    dtype = x.dtype
    if dtype is torch.float32 or dtype is torch.float64:  # by far the most calls: a token of decoding makes hundreds
        return x
    return x.to(torch.promote_types(dtype, torch.float32))
