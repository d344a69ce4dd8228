"""Matmuls of rows grouped by expert: fused where the operator exists for the dtype, a plain loop elsewhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED = (torch.float32, torch.bfloat16)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows [M, I] in expert order, weight [E, I, O], offsets [E] int32 (where each expert's rows end) -> [M, O]."""
    if rows.dtype not in FUSED:
        return loop(rows, weight, offsets)
    return F.grouped_mm(rows, weight, offs=offsets)


def loop(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The same by one matmul an expert: the reference, and the path of dtypes that the fused operator lacks (fp64)."""
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return torch.cat([part @ w for part, w in zip(rows.split(sizes), weight, strict=True)])
