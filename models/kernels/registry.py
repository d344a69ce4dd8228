"""Which kernel computes a rule: the only place that knows. The reference in PyTorch runs everywhere and is the oracle
of the others."""

from collections.abc import Callable

import torch

from models.kernels import delta, diagonal
from models.kernels.chunk import Begun

Kernel = Callable[..., Begun]

REFERENCE: dict[str, Kernel] = {
    "gla": diagonal.Chunks,
    "gated_delta_rule": delta.Chunks,
}


def kernel(rule: str, device: torch.device) -> Kernel:
    """The kernel of `rule` for tensors on `device`: `kernel(*xs, starts=, scale=)`."""
    return REFERENCE[rule]
