"""Promote, never demote: states, decays, norms and softmaxes are fp32 or better, whatever dtype the matmuls use."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in at least fp32 (`.float()` would demote fp64, which the parity tests run in)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
