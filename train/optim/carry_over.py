"""The optimizer's state, into a run that takes its weights from another (`init_from`).

What is best when a rate is warmed up again is not settled: ProLong keeps all of it (2410.02660), others begin anew.
"""

from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from train.checkpoints import checkpoint
from train.optim.compact_adamw import CompactAdamW

MEANS = ("exp_avg", "momentum_buffer")  # of gradients, as torch.optim names them


def load(path: Path, model: nn.Module, optimizer: Optimizer, what: str) -> None:
    """Fills the optimizer's state, then resets `what` of it; its settings stay those of this run. Collective.

    what: keep, reset_mean or reset_moments, as `train.settings.INIT_OPTIMIZER` has them.
    """
    checkpoint.load_moments(path, model, optimizer)
    reset(optimizer, what)


def reset(optimizer: Optimizer, what: str) -> None:
    """Sets running means to 0 in place: those of gradients, or all of a weight's shape. Counts of steps stay."""
    if isinstance(optimizer, CompactAdamW):
        for name in {"reset_moments": ("exp_avg", "exp_avg_sq"), "reset_mean": ("exp_avg",)}.get(what, ()):
            optimizer.reset(name)
        return
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            moment = isinstance(value, torch.Tensor) and value.shape == parameter.shape and name != "step"
            if moment and (what == "reset_moments" or what == "reset_mean" and name in MEANS):
                value.zero_()
