"""Parameter groups: weight decay where a parameter's declaration wants it, and nowhere else."""

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from models.axes import Declared
from parallel.apply import parameter_name


def build(make: Callable[..., Optimizer], model: nn.Module, declared: dict[str, Declared]) -> Optimizer:
    """`make` on two groups of the model's parameters; only the declared ones decay."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[declared[parameter_name(name)].decay].append(parameter)
    return make([{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}])


def set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
