"""Rotary positions that turn more slowly as sequences grow: the base that a curriculum has at a step."""

from copy import copy
from typing import Any

from torch import nn

from models.positions import RoPE


def rebase(model: nn.Module, base: float | None) -> None:
    """Gives the rotary positions of a model this base; None leaves them as they are (ABF: 2309.16039).

    A layer with a window sees no farther when sequences grow. One whose base is another than that of layers without a
    window, as Gemma 3's, keeps its own.
    """
    if base is None:
        return
    modules = rotary(model)
    for module, follows in zip(modules, following([(_window(m), _first(m)) for m in modules]), strict=True):
        if follows and module.positions.base != base:
            moved = copy(module.positions)  # one of them may serve several models
            moved.base, moved.first_base = base, _first(module)
            vars(module)["positions"] = moved


def following(layers: list[tuple[int | None, float]]) -> list[bool]:
    """Says of each layer whether a new base is for it. layers: of each its window and the base that it began with."""
    far = {base for window, base in layers if window is None}
    return [window is None or not far or base in far for window, base in layers]


def _window(module: Any) -> int | None:
    window: int | None = getattr(module, "window", None)
    return window


def _first(module: Any) -> float:
    """The base before any change."""
    base: float = getattr(module.positions, "first_base", module.positions.base)
    return base


def rotary(model: nn.Module) -> list[Any]:
    """The modules of a model whose positions are rotary."""
    return [module for module in model.modules() if isinstance(getattr(module, "positions", None), RoPE)]
