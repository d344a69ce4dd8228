"""Rotary position embedding (arXiv 2104.09864), half-split layout, by position within the document."""

import torch
from torch import Tensor


def rotate(x_BTHK: Tensor, positions_BT: Tensor, base: float) -> Tensor:
    """Rotates pairs (i, i + K/2) of each head by position · base^(-2i/K). Angles are fp64: exact at any length."""
    half = x_BTHK.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x_BTHK.device, dtype=torch.float64) / half)
    angle_BT1K = (positions_BT.to(torch.float64)[..., None] * frequency)[:, :, None, :]
    dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
    cos, sin = angle_BT1K.cos().to(dtype), angle_BT1K.sin().to(dtype)
    left, right = x_BTHK.to(dtype).chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x_BTHK.dtype)
