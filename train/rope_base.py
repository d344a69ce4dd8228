"""Rotary positions that turn more slowly as sequences grow: the base that a curriculum has at a step."""

from copy import copy
from typing import Any

from torch import nn

from models.positions import RoPE


def rebase(model: nn.Module, base: float | None) -> None:
    """Gives all rotary positions of a model this base; None leaves them as they are (ABF: 2309.16039)."""
    if base is None:
        return
    for module in rotary(model):
        if module.positions.base != base:
            moved = copy(module.positions)  # one of them may serve several models
            moved.base = base
            vars(module)["positions"] = moved


def rotary(model: nn.Module) -> list[Any]:
    """The modules of a model whose positions are rotary."""
    return [module for module in model.modules() if isinstance(getattr(module, "positions", None), RoPE)]
