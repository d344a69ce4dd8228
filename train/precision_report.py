"""`farspan plan precision.report=true`: how far rounding changes each layer's matrices, and which layers would pay.

The noise is measured. A copy of the model runs forward and back on the first tokens of the run, without a recipe; each
matrix of each product is rounded beside that, as a recipe would round it, and the result is not used. So a number is
one layer's own, and no layer's noise reaches another's number.

The gain is foretold, from shapes: three products at twice the rate of bf16, against the bytes that scales and codes
take to make. Products grow with tokens x inputs x outputs, codes with two of the three at a time, so that a narrow
layer, or an expert with few tokens, loses.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.axes import declarations, initial, start_buffers
from models.kernels.low_precision import INT8, Scaling, encode
from models.linear import Linear
from models.lm import LM
from models.moe import Experts, MoE
from models.recipes import NATIVE, RECIPES, Recipe, WeightProduct, policy
from models.sequence import Whole
from parallel.schedule.devices import CARRIED, DEVICES, REACHED
from train.loss import sums

TOKENS = 1024  # of the first sequence, at most
LARGEST_MODEL = 1_000_000_000  # weights: with their gradients 8 GB
KINDS = ("weights", "activations", "gradients")
BANDWIDTH = {"a100_40g": 1.555e12, "a100": 2.039e12, "h100": 3.35e12, "h200": 4.8e12, "b200": 8e12}  # bytes a second
WITHOUT_FP8 = ("a100", "a100_40g")
MASTER, HALF, CODE = 4, 2, 1  # bytes of a weight, of an activation or a gradient in bf16, and of a code


@dataclass
class NoiseProbe:
    """Stands where a layer's recipe would, multiplies without one, and measures how each recipe rounds each matrix.

    decibels: by recipe and kind of matrix, ten times the decimal logarithm of Σ x² / Σ (rounded x - x)².
    """

    recipes: dict[str, Recipe]
    decibels: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def linear(self, x: Tensor, weight: Tensor, past: None = None) -> Tensor:
        """x [..., K], weight [N, K] -> x Wᵀ [..., N]."""
        rows = x.flatten(0, -2)
        for name, recipe in self.recipes.items():
            self._measure(name, "weights", weight, recipe.forward.second)
            if not recipe.straight:
                self._measure(name, "weights", weight.T, recipe.input_gradient.second)
            self._measure(name, "activations", rows, recipe.forward.first)
            self._measure(name, "activations", rows.T, recipe.weight_gradient.second)
        y = x @ weight.T
        y.register_hook(self._gradient)
        return y

    def _gradient(self, grad: Tensor) -> None:
        """Measures the gradient of an output [..., N]."""
        rows = grad.flatten(0, -2)
        for name, recipe in self.recipes.items():
            self._measure(name, "gradients", rows, recipe.input_gradient.first)
            self._measure(name, "gradients", rows.T, recipe.weight_gradient.first)

    def _measure(self, recipe: str, kind: str, x: Tensor, scaling: Scaling | None) -> None:
        """Notes one matrix [R, K]; nothing where the recipe leaves it as it is, or it is all zeros."""
        x = x.detach()
        if scaling is not None and (signal := x.double().square().sum().item()):
            noise = (encode(x, scaling).values(x.dtype) - x).double().square().sum().item()
            self.decibels[recipe, kind].append(10 * math.log10(signal / noise) if noise else math.inf)

    def worst(self, recipe: str, *kinds: str) -> float | None:
        """The lowest of the matrices of these kinds; None where none was measured."""
        return min((ratio for kind in kinds for ratio in self.decibels[recipe, kind]), default=None)


@dataclass
class _OfExperts:
    """The probes of a layer of experts: of each weight [E, K, N] one, read an expert at a time."""

    probes: list[tuple[Tensor, NoiseProbe]]

    def grouped(self, rows: Tensor, weight: Tensor, offsets: Tensor, past: None = None) -> Tensor:
        """As `models.recipes.LowPrecision.grouped`."""
        probe = next(probe for each, probe in self.probes if each is weight)
        sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        return torch.cat([probe.linear(x, w.T) for x, w in zip(rows.split(sizes), weight.unbind(), strict=True)])


def put_probes(model: nn.Module, recipes: Iterable[str]) -> dict[str, NoiseProbe]:
    """Puts a probe of these recipes into every product with weights. Returns them by the names of `policy`."""
    formats = {name: RECIPES[name] for name in recipes}
    probes: dict[str, NoiseProbe] = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            both = []
            for part in ("gate_up", "down"):
                probes[f"{name}.{part}"] = NoiseProbe(formats)
                both.append((getattr(module, part), probes[f"{name}.{part}"]))
            module.low = _OfExperts(both)
        elif isinstance(module, Linear):
            module.low = probes[name] = NoiseProbe(formats)
    return probes


def with_weights(model: LM, seed: int, checkpoint: Path | None = None) -> LM:
    """Gives a model of the meta device its first weights, or a checkpoint's, in fp32 on the CPU.

    Raises ValueError for one of more than `LARGEST_MODEL` weights.
    """
    count = sum(p.numel() for p in model.parameters())
    if count > LARGEST_MODEL:
        raise ValueError(
            f"precision.report=true: runs the model on this machine, and it has {count:,} weights; accepts at most "
            f"{LARGEST_MODEL:,} (fewer layers of the same kinds say the same: model.layers=…)"
        )
    declared = declarations(model)
    model.to_empty(device="cpu")
    start_buffers(model, "cpu")
    if checkpoint is None:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(initial(seed, name, declared[name], tuple(weight.shape)))
    else:
        from train.checkpoints.checkpoint import read

        weights = model.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that no process group is there; none is needed
            read({"model": weights}, checkpoint, alone=True)
        model.load_state_dict(weights)
    model.compute = torch.float32
    return model


def measure_noise(model: LM, recipes: Iterable[str], sample: Any) -> dict[str, NoiseProbe]:
    """Runs a model on a packed sequence, `TOKENS` of it at most, forward and back. Returns its probes by layer.

    model: with weights, on the CPU. sample: `parallel.sequence.place.PackedSequence`.
    """
    probes = put_probes(model, recipes)
    tokens, targets, positions = (
        torch.from_numpy(getattr(sample, key)[:TOKENS])[None] for key in ("tokens", "targets", "positions")
    )
    sums(model(tokens, Whole.of(positions), targets)).cross_entropy.backward()
    return probes


def gain(recipe: str, shape: tuple[int, int], tokens: int, device: str) -> float | None:
    """The time of a layer's three products in bf16 over that by a recipe; None on a GPU without such products.

    shape: of the weight [N, K]. device: a name of `DEVICES`. A product reaches `REACHED` of the published rate, bytes
    `CARRIED` of it. Codes are made of x [M, K], g [M, N] and W for each product that has them: one read for the
    largest magnitudes, one for the values, and a write. Without a recipe W is cast once.
    """
    (N, K), M, formats = shape, tokens, RECIPES[recipe]
    first = formats.forward.second
    if formats.straight or device in WITHOUT_FP8 and (first is None or first.format != INT8):
        return None
    product = 2 * M * N * K / (DEVICES[device].flops * REACHED)
    pairs = (formats.forward, formats.input_gradient, formats.weight_gradient)
    low = sum(pair.first is not None for pair in pairs)
    x, g, w = (
        sum(scaling is not None for scaling in scalings)
        for scalings in (
            (formats.forward.first, formats.weight_gradient.second),
            (formats.input_gradient.first, formats.weight_gradient.first),
            (formats.forward.second, formats.input_gradient.second),
        )
    )
    made = (x * M * K + g * M * N) * (2 * HALF + CODE) + w * N * K * (2 * MASTER + CODE)
    rate = BANDWIDTH[device] * CARRIED
    plain = 3 * product + N * K * (MASTER + HALF) / rate
    return plain / (low * product / 2 + (3 - low) * product + made / rate)


class ReportedLayer(NamedTuple):
    """A product with weights, as the report has it. tokens: that a weight multiplies in a micro-step of a rank."""

    product: WeightProduct
    probe: NoiseProbe
    tokens: int


def reported(
    model: nn.Module, layers: Iterable[WeightProduct], probes: dict[str, NoiseProbe], tokens: int
) -> list[ReportedLayer]:
    """Joins what is known of each layer. tokens: of a rank in a micro-step; an expert has its share of them."""

    def share(name: str) -> int:
        owner = model.get_submodule(name.split(".experts.")[0]) if ".experts." in name else None
        return max(1, tokens * owner.top_k // owner.num_experts) if isinstance(owner, MoE) else tokens

    return [ReportedLayer(layer, probes[layer.name], share(layer.name)) for layer in layers]


def one_recipe(recipe: str, layers: list[ReportedLayer], device: str) -> list[str]:
    """A line a layer: decibels of its three kinds of matrices, its gain, and whether it follows the recipe."""
    rows = [("layer", "outputs x inputs", *(f"{kind}, dB" for kind in KINDS), "gain", "")]
    for product, probe, tokens in layers:
        factor = gain(recipe, product.shape, tokens, device)
        outcome = "follows" if product.why is None else f"high: {product.why}"
        if product.why is None and factor is not None and factor < 1:
            outcome += ", and would not pay"
        cells = (_decibels(probe.worst(recipe, kind)) for kind in KINDS)
        rows.append((product.name, _shape(product), *cells, "-" if factor is None else f"{factor:.2f}", outcome))
    return _aligned(rows)


def every_recipe(layers: list[ReportedLayer]) -> list[str]:
    """A line a layer: decibels of its worst matrix by each recipe, and whether the policy would have it follow one."""
    rows = [("layer", "outputs x inputs", *RECIPES, "")]
    for product, probe, _ in layers:
        cells = (
            _decibels(None if any(n % RECIPES[name].tiles for n in product.shape) else probe.worst(name, *KINDS))
            for name in RECIPES
        )
        outcome = "may follow" if product.why is None else f"high: {product.why}"
        rows.append((product.name, _shape(product), *cells, outcome))
    return _aligned(rows)


def report(
    model: LM,
    sample: Any,
    *,
    recipe: str,
    layers: list[WeightProduct],
    seed: int,
    tokens: int,
    device: str,
    checkpoint: Path | None = None,
) -> list[str]:
    """The lines of `farspan plan precision.report=true`.

    model: on the meta device; it gets weights. recipe: none for a comparison of all. layers: `policy`'s for the recipe,
    unused without one. tokens: of a rank in a micro-step. device: the GPU whose gain is foretold. Raises ValueError.
    """
    whose = "first weights" if checkpoint is None else f"weights of {checkpoint.name}"
    count = min(TOKENS, len(sample.tokens))
    names = RECIPES if recipe == "none" else [recipe]
    probes = measure_noise(with_weights(model, seed, checkpoint), names, sample)
    said = f"each layer's worst matrix of a kind, on {count:,} tokens with its {whose}"
    if recipe == "none":
        compared = reported(model, policy(model), probes, tokens)
        return [f"signal to quantisation noise in dB of {said}; precision=NAME has the gains", *every_recipe(compared)]
    name = DEVICES[device].name
    how = f"foretold of {tokens:,} tokens a micro-step on {name}"
    if recipe not in NATIVE["cuda"]:
        how += ", for kernels that farspan has not: it emulates this recipe, which is slower than none"
    return [
        f"signal to quantisation noise of {said}",
        f"gain: time of the three products without {recipe} over that with it, {how}",
        *one_recipe(recipe, reported(model, layers, probes, tokens), device),
    ]


def _decibels(ratio: float | None) -> str:
    return "-" if ratio is None else "exact" if math.isinf(ratio) else f"{ratio:.1f}"


def _shape(product: WeightProduct) -> str:
    several = f"{product.copies:,} of " if product.copies > 1 else ""
    return f"{several}{product.shape[0]:,} x {product.shape[1]:,}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of text: names to the left, numbers to the right, the last as it is."""
    last = len(rows[0]) - 1
    widths = [max(len(row[i]) for row in rows) for i in range(last)]
    sides = "<" + ">" * (last - 1)
    return ["  ".join([*(f"{row[i]:{sides[i]}{widths[i]}}" for i in range(last)), row[last]]).rstrip() for row in rows]
