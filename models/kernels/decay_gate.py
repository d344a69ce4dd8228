"""Gates of the delta rules: how fast a state decays, and how much of a value is written; in at least fp32.

    g = -e^A · softplus(x + b),    β = strongest · σ(x)

On CUDA the decay is one kernel, forward and backward (`models.kernels.registry.fused`).
"""

import torch.nn.functional as F
from torch import Tensor

from models.kernels.registry import fused
from models.precision import wide


def head_decay(x_BTH: Tensor, log_H: Tensor, bias_H: Tensor) -> Tensor:
    """The log decay of each head [B, T, H]; log: A."""
    if (kernel := fused("head_decay", x_BTH)) is not None:
        return kernel(x_BTH, log_H, bias_H)
    return -wide(log_H).exp() * F.softplus(wide(x_BTH) + wide(bias_H))


def channel_decay(x_BTHK: Tensor, log_H: Tensor, bias_HK: Tensor) -> Tensor:
    """The log decay of each channel of each head [B, T, H, K], of which every channel has a bias of its own [H · K]."""
    if (kernel := fused("channel_decay", x_BTHK)) is not None:
        return kernel(x_BTHK, log_H, bias_HK)
    dt_BTHK = F.softplus(wide(x_BTHK) + wide(bias_HK).view(x_BTHK.shape[-2:]))
    return -wide(log_H).exp().unsqueeze(-1) * dt_BTHK


def write_strength(x: Tensor, strongest: float) -> Tensor:
    """β in (0, strongest)."""
    beta = wide(x).sigmoid()
    return beta if strongest == 1.0 else strongest * beta
