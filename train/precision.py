"""The dtypes that a run computes in and keeps its weights in, and the recipe that its linear layers follow."""

from collections import Counter
from typing import TYPE_CHECKING

import torch

from train.settings import PrecisionSettings

if TYPE_CHECKING:
    from models.kernels.low_precision import Scaling
    from models.lm import LM
    from models.recipes import LowPrecision, Recipe, WeightProduct
    from train.run_config import RunConfig

EXPERT_WEIGHTS = ("gate_up", "down")
NAMES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def native_bf16(device: str) -> bool:
    """Says whether `device` multiplies bf16 natively: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())  # type: ignore[attr-defined]  # before torch 2.12


def dtypes(compute: str, device: str) -> tuple[torch.dtype, torch.dtype]:
    """(compute, master) dtypes for `precision.compute` on a device."""
    if compute == "auto":
        compute = "bf16" if native_bf16(device) else "fp32"
    return NAMES[compute], torch.float64 if compute == "fp64" else torch.float32


def layers_of(settings: PrecisionSettings, model: "LM", device: str) -> "list[WeightProduct]":
    """Every product with weights, and why it stays high; [] without a recipe and with master weights that stay high.
    Raises ValueError for a pattern that matches none, and a recipe that no layer can follow."""
    if settings.recipe == "none" and settings.masters == "high":
        return []
    from models.recipes import BF16_WEIGHTS, RECIPES, policy

    recipe = RECIPES.get(settings.recipe, BF16_WEIGHTS)
    grouped = device == "cpu" or recipe.delayed or settings.recipe == "none"
    layers = policy(model, recipe.tiles, high=settings.high, low=settings.low, grouped=grouped)
    if all(layer.why is not None for layer in layers):
        first = next((f"; of {layer.name}, {layer.why}" for layer in layers if "multiple" in str(layer.why)), "")
        raise ValueError(f"precision.recipe={settings.recipe}: no linear layer of this model may follow it{first}")
    return layers


def check_recipe(config: "RunConfig", model: "LM", device: str) -> None:
    """Raises ValueError for a recipe that the device, the layout or the model cannot have."""
    settings, recipe = config.precision, config.precision.recipe
    if settings.masters == "bf16":
        _check_masters(config)
        layers_of(settings, model, device)
    if recipe == "none":
        return
    if settings.kernel == "native" and not has_native(recipe, device):
        raise ValueError(
            f"precision.kernel=native: must be auto or emulated with precision.recipe={recipe} on {device}"
        )
    if settings.scales == "sequence" and config.parallel.stages > 1:
        raise ValueError("precision.scales=sequence: must be rank with a pipeline, whose micro-steps overlap")
    if recipe == "fp8_delayed" and config.parallel.stages > 1:
        raise ValueError(
            f"precision.recipe={recipe}: must be another with a pipeline: its ranks have other layers each"
        )
    if settings.gather == "codes":
        _check_gather(config)
    layers_of(settings, model, device)


def _check_gather(config: "RunConfig") -> None:
    from models.recipes import RECIPES

    recipe, must = config.precision.recipe, "precision.gather=codes: must be high with"
    if RECIPES[recipe].weight is None:
        having = ", ".join(name for name, each in RECIPES.items() if each.weight is not None)
        raise ValueError(f"{must} precision.recipe={recipe}, whose products read other codes each; {having} can")
    if config.parallel.stages > 1:
        raise ValueError(f"{must} a pipeline, whose micro-steps overlap")
    if config.engine.get("offload_optimizer"):
        raise ValueError(f"{must} engine.offload_optimizer=true")


def _check_masters(config: "RunConfig") -> None:
    must = "precision.masters=bf16: must be high with"
    if config.engine.get("offload_optimizer"):
        raise ValueError(f"{must} engine.offload_optimizer=true")
    if config.optimizer.get("fused") == "apex":
        raise ValueError(f"{must} optimizer.fused=apex, whose kernel has fp32 alone")


def gathered_weights(settings: PrecisionSettings, model: "LM", device: str) -> "dict[str, Scaling]":
    """The scaling of each weight that ranks gather in few bits, by the parameter's name."""
    coded = settings.gather == "codes"
    if not coded and settings.masters == "high":
        return {}
    from models.recipes import BF16_WEIGHTS, RECIPES

    scaling = RECIPES.get(settings.recipe, BF16_WEIGHTS).weight if coded else BF16_WEIGHTS.weight
    assert scaling is not None, "check_recipe refuses it"
    return dict.fromkeys(weights_of_layers(layers_of(settings, model, device)), scaling)


def weights_of_layers(layers: "list[WeightProduct]") -> list[str]:
    """The names of the parameters of those layers that follow; experts do so with both of their products."""
    chosen = {layer.name for layer in layers if layer.why is None}
    names = []
    for name in sorted(chosen):
        above = name.rpartition(".")[0]
        if not above.endswith(".experts"):
            names.append(f"{name}.weight")
        elif {f"{above}.{each}" for each in EXPERT_WEIGHTS} <= chosen:
            names.append(name)
    return names


def has_native(recipe: str, device: str) -> bool:
    """Says whether a device multiplies a recipe's codes; of machines that are not this one, by its kind alone."""
    from models.recipes import NATIVE, native

    if device == "cuda" and not torch.cuda.is_available():
        return recipe in NATIVE["cuda"]
    return native(recipe, device)


def follow(settings: PrecisionSettings, model: "LM", device: str) -> "tuple[LowPrecision | None, list[WeightProduct]]":
    """Gives a model's layers their recipe, and says which master weights are bf16, before they are sharded. Returns
    what the layers share, None where they have neither."""
    if not (layers := layers_of(settings, model, device)):
        return None, layers
    from models.recipes import BF16_WEIGHTS, RECIPES, LowPrecision, apply

    natively = settings.kernel == "native" or settings.kernel == "auto" and device != "cpu"
    low = LowPrecision(
        RECIPES.get(settings.recipe, BF16_WEIGHTS),
        natively and has_native(settings.recipe, device),
        gather=settings.gather == "codes",
        masters=settings.masters == "bf16",
    )
    apply(model, layers, low)
    return low, layers


def lines(config: "RunConfig", layers: "list[WeightProduct]", low: "LowPrecision", device: str) -> list[str]:
    """Says how much of a model follows the recipe, what does not and why, and what then depends on the layout."""
    key = f"precision.recipe={config.precision.recipe}"
    followed = [layer for layer in layers if layer.why is None]
    share = sum(layer.numel for layer in followed) / sum(layer.numel for layer in layers)
    how = "natively" if low.native else "emulated"
    whole = f"{len(followed)} of {len(layers)} products with weights"
    part = f"({share:.0%} of these weights)"
    told = [f"{key}: {whole} follow it {part}, {how} on {device}"]
    if low.masters:
        line = f"precision.masters=bf16: weights of {whole} {part}, updates rounded at random"
        told = [line] if config.precision.recipe == "none" else [*told, line]
        key = "precision.masters=bf16" if config.precision.recipe == "none" else key
    reasons = Counter(layer.why for layer in layers if layer.why is not None)
    for why, count in reasons.most_common():
        named = next(layer.name for layer in layers if layer.why == why)
        told.append(f"{key}: {count} stay high, as {named}: {why}")
    if low.gather:
        told.append("precision.gather=codes: ranks gather these weights as codes, a byte a number")
    return told + [f"{line}, so the loss depends on the layout" for line in dependence(config, low.recipe)]


def dependence(config: "RunConfig", recipe: "Recipe") -> list[str]:
    """Says which scales are not the same on every layout, each line opened by its key."""
    settings, told = config.precision, []
    tokens = [scaling for scaling in recipe.weight_gradient if scaling is not None]
    rows = [scaling for scaling in (recipe.forward.first, recipe.input_gradient.first) if scaling is not None]
    if any(not scaling.rows for scaling in rows) or any(not scaling.columns for scaling in tokens):
        whose = "a rank's tokens" if settings.scales == "rank" else "all tokens"
        when = " where a matrix has no past, in the first step" if recipe.delayed else ""
        told.append(f"precision.scales={settings.scales}: scales span {whose} of a micro-step{when}")
    if blocks := max((scaling.columns for scaling in tokens), default=0):
        told.append(
            f"precision.recipe={settings.recipe}: {blocks} tokens share a scale, of the same {blocks} only where every "
            f"span begins at a multiple of {blocks}"
        )
    if config.parallel.tensor > 1 and not recipe.delayed:
        told.append(f"parallel.tensor={config.parallel.tensor}: scales of weights are of a rank's part of them")
    return told
