"""The transfer of rates over width, seen from the model: how its head and routers start, and what a plan prints."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from models.axes import declarations, scaled
from models.lm import LM
from train.optim.build import build_optimizer
from train.optim.width import WidthFactors
from train.run_config import ObjectConfig


def _factors(node: ObjectConfig, model: nn.Module) -> WidthFactors | None:
    """None for an optimizer without transfer."""
    if node.get("transfer", "none") == "none":
        return None
    return WidthFactors(model.parameters(), node["base_width"])


def start_for_width(node: ObjectConfig, model: nn.Module) -> None:
    """Has the parameters that start smaller in a wider model declare so. model: before it is cut or initialised."""
    factors = _factors(node, model)
    for parameter in model.parameters() if factors else ():
        if (factor := factors.start(parameter)) != 1:  # type: ignore[union-attr]
            declared = parameter.declared  # type: ignore[attr-defined]
            parameter.declared = replace(declared, init=scaled(declared.init, factor))  # type: ignore[attr-defined]


def check_transfer(node: ObjectConfig, model: LM) -> None:
    """Raises ValueError for a tied head whose factor is another than that of a model so wide."""
    if _factors(node, model) is None or model.head is not None:
        return
    want = node["base_width"] ** 0.5 / model.dim
    if abs(model.tied_scale / want - 1) > 1e-3:
        raise ValueError(
            f"model.tied_scale={model.tied_scale:g}: must be {want:.6g} (base_width^½ / dim) with a tied head and "
            "optimizer.transfer=width"
        )


def lines(node: ObjectConfig, model: nn.Module) -> list[str]:
    """The multipliers of every group of parameters, the layers' numbers left out; none without transfer."""
    factors = _factors(node, model)
    if factors is None:
        return []
    optimizer = build_optimizer(node.build(), model, declarations(model))
    names = {p: re.sub(r"\.\d+\.", ".*.", name) for name, p in model.named_parameters()}
    groups: dict[tuple[float, float, float], list[str]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            key = (group["factor"], group.get("weight_decay", 0.0), factors.start(p))
            groups.setdefault(key, []).append(names[p])
    first = f"{factors.widening:g} times optimizer.base_width={node['base_width']}"
    return [first, *(_line(key, groups[key]) for key in sorted(groups, reverse=True))]


def _line(key: tuple[float, float, float], names: Iterable[str]) -> str:
    rate, decay, start = key
    several: dict[str, Any] = dict.fromkeys(names)
    return f"rate × {rate:.4g}, weight decay {decay:.4g}, start × {start:.4g}: {', '.join(several)}"
