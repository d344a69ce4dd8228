"""Parameter groups: weight decay where a parameter's declaration wants it, and nowhere else; other rates by axes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from models.axes import AXES, Declared, declarations
from parallel.activation_memory import parameter_name
from train.optim.width import WidthFactors, never
from train.run_config import ObjectConfig

Make = Callable[..., Optimizer]


def build_optimizer(make: Make, model: nn.Module, declared: dict[str, Declared]) -> Optimizer:
    """`make` on two groups of the model's parameters; only the declared ones decay, and frozen ones are in none.

    Each parameter carries its declaration as `.declared` from here on: sharding has made new ones.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parameter.declared = declared[parameter_name(name)]  # type: ignore[attr-defined]
        if parameter.requires_grad:  # else it stays as it is
            groups[declared[parameter_name(name)].decay].append(parameter)
    return make([{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}])


def axes(parameter: torch.Tensor) -> set[str]:
    """The names of its axes, none of a parameter that declares nothing."""
    declared: Declared | None = getattr(parameter, "declared", None)
    return {axis for axis in declared.axes if axis is not None} if declared else set()


def refined(
    params: Iterable[Any],
    *,
    no_decay: Sequence[str] = (),
    rates: Mapping[str, float] | None = None,
    base_width: int | None = None,
    weight_decay: float = 0.0,
    orthogonal: Callable[[torch.Tensor], bool] = never,
) -> list[dict[str, Any]]:
    """Groups, or plain parameters, as groups with one weight decay, one factor of the rate and one mesh each.

    no_decay: axes whose parameters do not decay. rates: by axis, what the rate of its parameters is multiplied by; a
    parameter with several of them has the product. base_width: of `train.optim.width`, None without transfer;
    orthogonal: as there; weight_decay: of groups that say nothing of it. Groups that need no dividing stay as they are.
    Raises ValueError for what is no axis, or a factor below 0.
    """
    rates = dict(rates or {})
    for key, names in (("no_decay", list(no_decay)), ("rates", list(rates))):
        if unknown := [name for name in names if name not in AXES]:
            raise ValueError(f"optimizer.{key}={unknown[0]}: must be one of {', '.join(AXES)}")
    for axis, rate in rates.items():
        if not 0 <= rate < float("inf"):
            raise ValueError(f"optimizer.rates.{axis}={rate}: must not be negative")
    given = list(params)
    groups: list[dict[str, Any]] = given if given and isinstance(given[0], dict) else [{"params": given}]
    widths = None
    if base_width is not None:
        widths = WidthFactors((p for group in groups for p in group["params"]), base_width, orthogonal)
    refined_groups: list[dict[str, Any]] = []
    for group in groups:
        within: dict[tuple[bool, float, float, DeviceMesh | None], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            named = axes(parameter)
            factor: float = group.get("factor", 1.0)
            for axis in sorted(named & rates.keys()):
                factor *= rates[axis]
            mesh = getattr(parameter, "device_mesh", None)
            width = widths.rate(parameter) if widths else 1.0
            within.setdefault((bool(named & set(no_decay)), factor, width, mesh), []).append(parameter)
        for (stays, factor, width, _), several in within.items() or [((False, 1.0, 1.0, None), [])]:
            more = {"weight_decay": 0.0} if stays else {}
            if width != 1:
                more = {"weight_decay": more.get("weight_decay", group.get("weight_decay", weight_decay)) / width}
                factor *= width
            refined_groups.append({**group, "params": several, "factor": factor} | more)
    return refined_groups


def set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def moments(make: Make, model: nn.Module) -> int:
    """Numbers that the optimizer keeps beside the weights: AdamW's two for each, or one for each of a matrix of Muon's,
    or fewer of as many bits.

    model: before it is sharded.
    """
    optimizer = build_optimizer(make, model, declarations(model))
    groups = optimizer.param_groups
    if hasattr(optimizer, "numbers"):
        return round(sum(optimizer.numbers(p) for group in groups for p in group["params"]))
    return sum((1 if group.get("muon") else 2) * p.numel() for group in groups for p in group["params"])


def _import_no_compiler() -> None:
    """Marks what each optimizer's constructor calls as it is, so that torch does not import its compiler, FSDP and
    DTensor to mark it, for two seconds of a launcher that compiles nothing."""
    plain = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", None)
    if plain is not None and not hasattr(plain, "__dynamo_disable"):
        plain.__dynamo_disable = plain


def try_optimizer(node: ObjectConfig, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Builds the optimizer of a configuration for one parameter. Raises ValueError, the message with its key.

    device, dtype: of the master weights of the run that it is for.
    """
    _import_no_compiler()
    try:
        optimizer = node.build()([nn.Parameter(torch.zeros(1, dtype=dtype))])
        if hasattr(optimizer, "check"):
            optimizer.check(device)
    except (TypeError, ValueError, RuntimeError) as error:
        line = str(error)
        raise ValueError(line if line.startswith("optimizer.") else f"optimizer: {line}") from None
