"""Which kernel computes a rule: the only place that knows. The reference in PyTorch runs everywhere and is the oracle
of the others."""

from collections.abc import Callable

import torch

from models.kernels import complex, delta, diagonal, elementwise, longhorn, stabilised
from models.kernels.chunk import Begun

Kernel = Callable[..., Begun]

REFERENCE: dict[str, Kernel] = {
    "linear": diagonal.begin,
    "simple_gla": diagonal.begin,
    "gla": diagonal.begin,
    "delta_rule": delta.begin,
    "gated_delta_rule": delta.begin,
    "kda": delta.begin,
    "elementwise": elementwise.Scanned,
    "longhorn": longhorn.Blocks,
    "complex": complex.Scanned,
    "mlstm": stabilised.Chunks,
}


def kernel(rule: str, device: torch.device) -> Kernel:
    """The kernel of `rule` for tensors on `device`: `kernel(*xs, starts=, scale=)`."""
    return REFERENCE[rule]
