"""Recipes of few bits for a model's linear layers, and the policy that says which of them may have one.

A linear layer multiplies three times: y = x Wᵀ forward, and backward dx = g W and dW = gᵀ x. A recipe gives each
matrix of each product a format and the values that share a scale (`models.kernels.low_precision`).

A hybrid model has layers that bear it less than a transformer's. A decay of 0.999 a token forgets half in 700 tokens,
one of 0.996 in 170: an error of 0.3% there is one of 4 in how far a layer sees. So everything stays high that makes a
decay, a gate, a writing strength or a token's experts, and all that is no product of a weight anyway: short
convolutions, norms, A_log, states, logsumexps, the embedding; and the head, whose logits the loss reads.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.delayed_scaling import GRADIENTS, INPUTS, WEIGHTS, Magnitudes
from models.kernels.coded_weight import CodedWeight
from models.kernels.grouped_ffn import grouped_linear, grouped_weight_gradient
from models.kernels.low_precision import (
    BF16,
    E4M3,
    E5M2,
    INT4,
    INT8,
    Codes,
    Scaling,
    Share,
    block_kernels,
    encode,
    encode_blocks,
    product,
)
from models.linear import Linear
from models.moe import Experts
from models.recompute import kept
from models.router import Router


class Delay(NamedTuple):
    """The source of a matrix's scale: a row of its layer's magnitudes. noted: this step's is added to them."""

    past: Magnitudes
    matrix: int
    noted: bool


class Pair(NamedTuple):
    """The scalings of a product's two matrices; None for one that stays as it is."""

    first: Scaling | None = None
    second: Scaling | None = None


class Recipe(NamedTuple):
    """The three products of a linear layer. tiles: both widths of a weight must be multiples of it.

    forward: of x and W. input_gradient: of g and Wᵀ. weight_gradient: of gᵀ and xᵀ. straight: W has the same codes in
    both products, and its gradient passes by the rounding as if there were none (1308.3432). delayed: scales are of
    earlier steps (`models.delayed_scaling`).
    """

    tiles: int
    forward: Pair
    input_gradient: Pair
    weight_gradient: Pair
    straight: bool = False
    delayed: bool = False

    @property
    def weight(self) -> Scaling | None:
        """The scaling of W where both products that read it have the same codes of it, else None."""
        scaling = None if self.delayed else self.forward.second
        same = scaling == self.input_gradient.second and scaling is not None and scaling.rows == scaling.columns
        return scaling if self.straight or same else None


_TENSOR, _TENSOR_GRADIENT = Scaling(E4M3, 0, 0), Scaling(E5M2, 0, 0)
_ROW, _MX, _INT8 = Scaling(E4M3, 1, 0, True), Scaling(E4M3, 1, 32, True), Scaling(INT8, 1, 0)
_PART, _SQUARE = Scaling(E4M3, 1, 128), Scaling(E4M3, 128, 128)

RECIPES = {
    "fp8_tensorwise": Recipe(16, Pair(_TENSOR, _TENSOR), *(2 * (Pair(_TENSOR_GRADIENT, _TENSOR),))),
    # Transformer Engine's format for it: E4M3 forward, E5M2 backward.
    "fp8_delayed": Recipe(16, Pair(_TENSOR, _TENSOR), *(2 * (Pair(_TENSOR_GRADIENT, _TENSOR),)), delayed=True),
    "fp8_rowwise": Recipe(16, *(3 * (Pair(_ROW, _ROW),))),
    # The weight's gradient, which sums over all tokens, is as it would be without a recipe.
    "fp8_rowwise_wide": Recipe(16, Pair(_ROW, _ROW), Pair(_ROW, Scaling(E4M3, 0, 0, True)), Pair()),
    # DeepSeek-V3, 2412.19437, section 3.3.
    "fp8_blockwise": Recipe(128, Pair(_PART, _SQUARE), Pair(_PART, _SQUARE), Pair(_PART, _PART)),
    # OCP Microscaling Formats 1.0; scales rounded up, so that nothing is cut off.
    "mxfp8": Recipe(32, *(3 * (Pair(_MX, _MX),))),
    # SwitchBack's rows (2304.13013), in all three products.
    "int8": Recipe(16, *(3 * (Pair(_INT8, _INT8),))),
    "int8_weights": Recipe(1, Pair(None, _INT8), Pair(None, _INT8), Pair(), straight=True),
    "int4_weights": Recipe(32, *(2 * (Pair(None, Scaling(INT4, 1, 32)),)), Pair(), straight=True),
}
# Products as they are without a recipe, of weights of 16 bits: those of layers whose master weights are bf16.
BF16_WEIGHTS = Recipe(1, *(2 * (Pair(None, Scaling(BF16, 0, 0, True)),)), Pair(), straight=True)
NATIVE = {  # recipes that have a product of codes, torch's or farspan's own, by kind of device
    "cpu": ("fp8_tensorwise", "fp8_delayed", "fp8_rowwise", "fp8_rowwise_wide", "int8"),
    "cuda": ("fp8_tensorwise", "fp8_delayed", "fp8_rowwise", "fp8_rowwise_wide", "fp8_blockwise"),
}
BY_TRITON = "fp8_blockwise"  # whose kernels are farspan's own
CAPABILITY = (8, 9)  # of an NVIDIA GPU, from which on it multiplies FP8


def native(name: str, device: str) -> bool:
    """Says whether `device` has a product of its own for all codes of a recipe."""
    if name not in NATIVE.get(device, ()):
        return False
    if name == BY_TRITON:
        kernels = block_kernels()
        return kernels is not None and torch.cuda.get_device_capability() >= kernels.CAPABILITY
    return device != "cuda" or torch.cuda.get_device_capability() >= CAPABILITY


@dataclass
class LowPrecision:
    """A recipe at work in a model. native: multiply codes by the device's own product. share: makes the largest
    magnitudes of scales that span tokens those of all ranks that share a sequence; None for this rank's. gather:
    weights of layers come from other devices as codes (`models.kernels.coded_weight`). masters: master weights of
    layers are bf16, which makes them come so, too, where they do not as codes."""

    recipe: Recipe
    native: bool = False
    share: Share | None = None
    gather: bool = False
    masters: bool = False

    def linear(self, x: Tensor, weight: Tensor, past: Magnitudes | None = None) -> Tensor:
        """x [..., K], weight [N, K] -> x Wᵀ [..., N] in x's dtype. The gradients follow the recipe too. past: of the
        layer, where the recipe's scales are delayed; a pass with gradients adds this step's magnitudes to it."""
        y: Tensor = _Product.apply(x, weight, self, past, torch.is_grad_enabled(), None)
        return y

    def grouped(self, rows: Tensor, weight: Tensor, offsets: Tensor, past: Magnitudes | None = None) -> Tensor:
        """`models.kernels.grouped_ffn.grouped_linear`, an expert at a time, each with scales of its own. past: of the
        product, where scales are delayed: all experts have the same, and are multiplied at once."""
        if past is not None:
            y: Tensor = _Grouped.apply(rows, weight, offsets, self, past, torch.is_grad_enabled())
            return y
        sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        each: Tensor = _Product.apply(rows, weight, self, None, torch.is_grad_enabled(), sizes)
        return each

    def output(
        self, rows: Tensor, weight: Tensor | Codes, dtype: torch.dtype, past: Magnitudes | None, noted: bool
    ) -> Tensor:
        """rows [M, K], weight [N, K] -> [M, N] in `dtype`."""
        delays = _delays(past, (INPUTS, WEIGHTS), noted)
        return self.multiply(rows, weight, self.recipe.forward, dtype, tokens=(0, None), delays=delays)

    def input_gradient(self, grad: Tensor, weight: Tensor | Codes, past: Magnitudes | None) -> Tensor:
        """grad [M, N], weight [N, K] -> [M, K] in grad's dtype."""
        pair, scaling = self.recipe.input_gradient, self.recipe.forward.second
        other = weight.transposed() if isinstance(weight, Codes) else weight.T
        if self.recipe.straight and scaling is not None:
            codes = weight if isinstance(weight, Codes) else encode(weight, scaling)
            pair, other = Pair(), codes.values(grad.dtype).T
        delays = _delays(past, (GRADIENTS, WEIGHTS), True)
        return self.multiply(grad, other, pair, grad.dtype, tokens=(0, None), delays=delays)

    def weight_gradient(self, grad: Tensor, rows: Tensor, dtype: torch.dtype, past: Magnitudes | None) -> Tensor:
        """grad [M, N], rows [M, K] -> [N, K] in `dtype`, the weight's."""
        pair = self.recipe.weight_gradient
        made = grad.dtype if pair == Pair() else dtype
        delays = _delays(past, (GRADIENTS, INPUTS), True)
        return self.multiply(grad.T, rows.T, pair, made, tokens=(1, 1), delays=delays).to(dtype)

    def multiply(
        self,
        first: Tensor,
        second: Tensor | Codes,
        pair: Pair,
        dtype: torch.dtype,
        *,
        tokens: tuple[int | None, int | None],
        delays: tuple[Delay | None, Delay | None] = (None, None),
    ) -> Tensor:
        """first [M, K] times the transpose of second [N, K] -> [M, N] in `dtype`. second: codes stay as they are.

        tokens: the dimension of each that is tokens, None for none.
        """
        each = zip((first, second), pair, tokens, delays, strict=True)
        a, b = (self._codes(x, scaling, dim, delay) for x, scaling, dim, delay in each)
        return product(a, b, dtype, native=self.native)

    def rounded(
        self,
        x: Tensor,
        scaling: Scaling | None,
        tokens: int | None,
        delay: Delay | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The values of x's codes, [..., K] as x, in `dtype` or x's."""
        codes = self._codes(x.flatten(0, -2), scaling, tokens, delay)
        values = codes.values(dtype or x.dtype) if isinstance(codes, Codes) else codes.to(dtype or x.dtype)
        return values.view(x.shape)

    def _codes(
        self, x: Tensor | Codes, scaling: Scaling | None, tokens: int | None, delay: Delay | None
    ) -> Codes | Tensor:
        if scaling is None or isinstance(x, Codes):
            return x
        if self.native and scaling.columns and x.numel():
            return encode_blocks(x, scaling)
        spans = tokens is not None and not (scaling.rows, scaling.columns)[tokens]
        share = self.share if spans else None
        return encode(x, scaling, share if delay is None else partial(_delayed, delay, share))


class _Product(torch.autograd.Function):
    """x Wᵀ by a recipe, whose result is kept where a layer keeps results; of experts' weights W [E, K, N], each with
    the rows that are its own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        low: LowPrecision,
        past: Magnitudes | None,
        noted: bool,
        sizes: list[int] | None,
    ) -> Tensor:
        coded = isinstance(weight, CodedWeight)  # whoever moves what is saved knows nothing of codes
        ctx.save_for_backward(x, *([] if coded else [weight]))
        ctx.low, ctx.past, ctx.coded, ctx.sizes = low, past, weight if coded else None, sizes
        rows = x.reshape(-1, x.shape[-1])
        outputs = len(weight) if sizes is None else weight.shape[-1]
        shape = (*x.shape[:-1], outputs)  # no -1: an expert may have no tokens

        def result() -> Tensor:
            parts = zip(rows.split([len(rows)] if sizes is None else sizes), _matrices(weight, low.recipe), strict=True)
            several = [low.output(part, each, x.dtype, past, noted) for part, each in parts]
            return (several[0] if sizes is None else torch.cat(several)).view(shape)

        return kept(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, *saved), low, sizes = ctx.saved_tensors, ctx.low, ctx.sizes
        weight = saved[0] if saved else ctx.coded
        g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        split = [len(rows)] if sizes is None else sizes
        gradients, inputs = g.split(split), rows.split(split)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            each = zip(gradients, _matrices(weight, low.recipe), strict=True)
            several = [low.input_gradient(part, matrix, ctx.past) for part, matrix in each]
            dx = (several[0] if sizes is None else torch.cat(several)).view_as(x)
        if ctx.needs_input_grad[1]:
            if sizes is None:
                dw = low.weight_gradient(g, rows, weight.dtype, ctx.past)
            else:
                dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
                for part, own, into in zip(gradients, inputs, dw, strict=True):
                    into.copy_(low.weight_gradient(part, own, weight.dtype, None).T)
        return dx, dw, None, None, None, None


def _matrices(weight: Tensor, recipe: Recipe) -> Iterable[Tensor | Codes]:
    """A weight as products read it, [N, K], or each expert's: codes where they are the recipe's own."""
    if not isinstance(weight, CodedWeight):
        return [weight] if weight.dim() == 2 else [each.T for each in weight]
    codes = [weight.codes] if weight.dim() == 2 else weight.matrices()
    own = recipe.weight is not None and recipe.weight.format == weight.codes.scaling.format
    return codes if own else (each.values(weight.dtype) for each in codes)


def _numbers(weight: Tensor) -> Tensor:
    """A weight that comes as bf16 in its own dtype, of its form."""
    return weight.codes.values(weight.dtype).view(weight.shape) if isinstance(weight, CodedWeight) else weight


class _Grouped(torch.autograd.Function):
    """`_Product` of all experts at once, whose matrices have one scale each: rows [M, K], weight [E, K, N]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor, low: LowPrecision, past: Magnitudes, noted: bool
    ) -> Tensor:
        coded = isinstance(weight, CodedWeight)
        ctx.save_for_backward(rows, offsets, *([] if coded else [weight]))
        ctx.low, ctx.past, ctx.coded = low, past, weight if coded else None
        pair, (of_rows, of_weight) = low.recipe.forward, _delays(past, (INPUTS, WEIGHTS), noted)

        def run() -> Tensor:
            values = low.rounded(rows, pair.first, 0, of_rows)
            numbers = _numbers(weight)
            return grouped_linear(values, low.rounded(numbers, pair.second, None, of_weight, rows.dtype), offsets)

        return kept(run)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows, offsets, *saved), low = ctx.saved_tensors, ctx.low
        weight = saved[0] if saved else ctx.coded
        of_grad, of_weight = _delays(ctx.past, (GRADIENTS, WEIGHTS), True)
        first, second = low.recipe.input_gradient
        g = low.rounded(grad, first, 0, of_grad)
        numbers = low.rounded(_numbers(weight), second, None, of_weight, grad.dtype)
        dx = grouped_linear(g, numbers.transpose(1, 2), offsets)
        x = low.rounded(rows, low.recipe.weight_gradient.second, 0, _delays(ctx.past, (INPUTS, INPUTS), True)[0])
        return dx, grouped_weight_gradient(x, g, offsets).to(weight.dtype), None, None, None, None


def _delays(past: Magnitudes | None, matrices: tuple[int, int], noted: bool) -> tuple[Delay | None, Delay | None]:
    if past is None:
        return None, None
    return Delay(past, matrices[0], noted), Delay(past, matrices[1], noted)


def _delayed(delay: Delay, share: Share | None, now: Tensor) -> Tensor:
    """The magnitude that a matrix is scaled by, [1, 1]. Ranks agree on the matrix's own only where it has no past."""
    past, matrix, noted = delay
    if noted:
        past.note(matrix, now)
    if share is not None and not past.known:
        now = share(now)
    return past.expected(matrix, now)


INDEX = "makes the scores by which keys are selected"
GATES = "makes decays, gates or writing strengths"
OUTPUT_GATE = "gates an output"
BY_NAME = {  # the last part of a linear layer's name, in any mixer or feed-forward
    **dict.fromkeys(
        (
            "alpha",
            "angles",
            "beta",
            "decay_in",
            "decay_out",
            "dt",
            "erase",
            "f",
            "gates",
            "mix_in",
            "rates",
            "scale",
            "write",
        ),
        GATES,
    ),
    **dict.fromkeys(("gate", "gate_in", "gate_out", "shared_gate", "y", "z"), OUTPUT_GATE),
    **dict.fromkeys(("index_k", "index_q", "index_weights"), INDEX),
    "head": "makes logits",
}
BY_CLASS = {  # names that mean something else elsewhere, by the class of the module that has them
    "HGRN2": {"qfv": GATES},
    "LightNet": {"qkv": "makes keys whose exponentials decay states"},
    "Longhorn": {"dkq": GATES},
    "LowRank": {"into": GATES, "out": GATES},
    "Mamba": {"dbc": GATES},
    "MinLSTM": {"i": GATES},
    "SLSTM": {"values": "enters a recurrence that is not linear"},
}


class WeightProduct(NamedTuple):
    """A product with weights. name: of the module. shape: of a weight, outputs first. copies: of weights, as experts
    have several. why: the reason for which it stays high, None for one that follows the recipe."""

    name: str
    shape: tuple[int, int]
    copies: int
    why: str | None

    @property
    def numel(self) -> int:
        return self.copies * self.shape[0] * self.shape[1]


def policy(
    model: nn.Module, tiles: int = 1, *, high: Iterable[str] = (), low: Iterable[str] = (), grouped: bool = True
) -> list[WeightProduct]:
    """Every product with weights of a model, in its order; of experts, one for each of their two.

    high, low: patterns of names (`*` for any text) that stay high besides, and that do not although the policy would
    have them do so; tiles are asked for in any case. grouped: whether experts may have a recipe. Raises ValueError for
    a pattern that matches no layer.
    """
    asked = {"high": tuple(high), "low": tuple(low)}
    matched: set[str] = set()

    def matches(key: str, name: str) -> bool:
        several = {pattern for pattern in asked[key] if fnmatchcase(name, pattern)}
        matched.update(several)
        return bool(several)

    layers = []
    for name, shape, count, reason in _products(model, grouped):
        forced, opened = matches("high", name), matches("low", name)
        why = "precision.high" if forced else None if opened else reason
        if why is None and (odd := [n for n in shape if n % tiles]):
            why = f"{odd[0]} is no multiple of {tiles}"
        layers.append(WeightProduct(name, shape, count, why))
    for key, patterns in asked.items():
        for pattern in patterns:
            if pattern not in matched:
                raise ValueError(f"precision.{key}={pattern}: must match a linear layer, as layers.0.* does")
    return layers


def _products(model: nn.Module, grouped: bool) -> Iterable[WeightProduct]:
    """Each by the policy alone, whatever its widths are."""
    parents = dict(model.named_modules())
    for name, module in parents.items():
        if isinstance(module, Experts):
            why = None if grouped else "has no product of codes for experts here"
            for part in ("gate_up", "down"):
                count, inputs, outputs = getattr(module, part).shape
                yield WeightProduct(f"{name}.{part}", (outputs, inputs), count, why)
        elif isinstance(module, Linear):
            above, _, last = name.rpartition(".")
            outputs, inputs = module.weight.shape
            of_class = BY_CLASS.get(type(parents[above]).__name__, {})
            why = "chooses experts" if isinstance(module, Router) else of_class.get(last, BY_NAME.get(last))
            if last == "kv_b" and getattr(parents[above], "absorb", False):
                why = "is multiplied into queries and outputs, outside of its layer"
            yield WeightProduct(name, (outputs, inputs), 1, why)


def apply(model: nn.Module, layers: Iterable[WeightProduct], low: LowPrecision) -> None:
    """Gives the layers that need not stay high their recipe. Experts follow with both products or with neither."""
    chosen = {layer.name for layer in layers if layer.why is None}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            follows = {f"{name}.gate_up", f"{name}.down"} <= chosen
            module.low = low if follows else None
            delayed = follows and low.recipe.delayed
            module.gate_up_magnitudes, module.down_magnitudes = (Magnitudes() if delayed else None for _ in range(2))
        elif isinstance(module, Linear):
            module.low = low if name in chosen else None
            module.magnitudes = Magnitudes() if name in chosen and low.recipe.delayed else None


class GatheredWeight(NamedTuple):
    """A weight that comes from other devices in few bits. name: of the parameter. module, attribute: whose it is.
    scaling: of its codes, None for one that comes as the bf16 that it is. masters: whether it is kept in bf16.
    of_experts: whether it is [E, K, N]."""

    name: str
    module: nn.Module
    attribute: str
    scaling: Scaling | None
    masters: bool
    of_experts: bool


def gathered_weights(model: nn.Module) -> list[GatheredWeight]:
    """The weights of a model whose layers have them come from other devices in few bits."""
    found = []
    for name, module in model.named_modules():
        low: LowPrecision | None = getattr(module, "low", None)
        if low is not None and isinstance(module, Experts | Linear) and (low.gather or low.masters):
            scaling = low.recipe.weight if low.gather else None
            several = isinstance(module, Experts)
            for part in ("gate_up", "down") if several else ("weight",):
                found.append(GatheredWeight(f"{name}.{part}", module, part, scaling, low.masters, several))
    return found
