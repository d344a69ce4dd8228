"""Forget gates with a lower bound for each layer (HGRN, Qin, Yang & Zhong 2023, 2311.04823).

The bounds rise with depth, from 0: lower layers may forget everything, upper ones must remember. They are learnt, one
per layer and channel, and made monotonic by a softmax over layers and its running sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.axes import constant
from models.cross_layer import Coupling
from models.precision import wide


def bounds(table_LD: Tensor) -> list[Tensor | None]:
    """The bounds [D] of L layers, from their logits; None for the first, whose bound is 0 and has no log."""
    shares_LD = wide(table_LD).softmax(0)
    return [None, *shares_LD[1:].cumsum(0).unbind(0)]


def lower_bound(width: int) -> Coupling:
    """Asks for the argument `lower_bound`; with logits of zero, layer l of L starts at l / L."""
    return Coupling("lower_bound", width, "heads", constant(0.0), bounds)


def log_forget(f: Tensor, bound_D: Tensor | None) -> Tensor:
    """log(bound + (1 - bound)·σ(f)) in at least fp32, f [..., D]; a sum of logs, exact where σ(f) is not."""
    open_gate = F.logsigmoid(wide(f))
    if bound_D is None:
        return open_gate
    return torch.logaddexp(bound_D.log(), torch.log1p(-bound_D) + open_gate)
