"""Which kernel computes a rule: the only place that knows. The reference in PyTorch runs everywhere and is the oracle
of the others."""

from collections.abc import Callable

import torch

from models.kernels import complex, delta, diagonal, elementwise, longhorn, scalar, stabilised
from models.kernels.chunk import Begun

Kernel = Callable[..., Begun]

REFERENCE: dict[str, Kernel] = {
    "linear": scalar.Chunks,
    "simple_gla": scalar.Chunks,
    "gla": diagonal.Chunks,
    "delta_rule": delta.ungated,
    "gated_delta_rule": delta.Chunks,
    "kda": delta.Chunks,
    "elementwise": elementwise.Scanned,
    "longhorn": longhorn.Blocks,
    "complex": complex.Scanned,
    "mlstm": stabilised.Chunks,
}


def kernel(rule: str, device: torch.device) -> Kernel:
    """The kernel of `rule` for tensors on `device`: `kernel(*xs, starts=, scale=)`."""
    return REFERENCE[rule]
