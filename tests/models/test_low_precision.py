"""Formats of few bits against tables of their values, recipes against the products that they are, and the policy."""

from functools import partial
from itertools import product as pairs
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from launch.config.compose import composed
from models.block import Block
from models.ffn import SwiGLU
from models.kernels.low_precision import E4M3, E5M2, INT4, INT8, LARGEST, Scaling, encode, largest, product
from models.linear import Linear
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.recipes import NATIVE, RECIPES, LowPrecision, Pair, apply, native, policy
from models.recompute import Tape
from tests.models.test_mixers import CASES, build
from train.settings import RecipeName


def table(format: str) -> np.ndarray:
    """All finite values of a format, from its definition (OCP 8-bit floating point, 1.0): sign, exponent, mantissa."""
    if format in (INT8, INT4):
        return np.arange(-LARGEST[format], LARGEST[format] + 1)
    bits, bias, top = (3, 7, 15) if format == E4M3 else (2, 15, 30)
    values = [0.0]
    for exponent, mantissa in pairs(range(top + 1), range(1 << bits)):
        if format == E4M3 and (exponent, mantissa) == (15, 7):
            continue  # NaN
        small = exponent == 0
        values.append((mantissa / (1 << bits) + (not small)) * 2.0 ** (max(exponent, 1) - bias))
    return np.unique([sign * value for sign in (-1, 1) for value in values])


@pytest.mark.parametrize("format", [E4M3, E5M2, INT8, INT4])
@pytest.mark.parametrize("rows, columns", [(0, 0), (1, 0), (1, 32), (4, 8)])
@pytest.mark.parametrize("power", [False, True])
def test_codes_are_the_nearest_values_of_their_format(format, rows, columns, power):
    x = torch.randn(9, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    codes = encode(x, Scaling(format, rows, columns, power))
    got, known = codes.values(torch.float64).numpy(), table(format)
    for i, j in pairs(range(0, 9, rows or 9), range(0, 70, columns or 70)):
        part = np.s_[i : i + (rows or 9), j : j + (columns or 70)]
        scale = np.abs(x[part].numpy()).max() / known.max()
        scale = 2 ** np.ceil(np.log2(scale)) if power else scale
        off = np.abs(x[part].numpy()[..., None] / scale - known)
        np.testing.assert_allclose(np.abs(got[part] - x[part].numpy()) / scale, off.min(-1), atol=1e-6)


def test_outliers_spoil_what_shares_their_scale():
    """Four rows of 256 that are 1e5 times as large: with a scale a tensor the others are lost, in blocks they are
    not."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 512, generator=draw), torch.randn(128, 512, generator=draw)
    x[::64] *= 1e5
    errors = {}
    for name in ("fp8_tensorwise", "fp8_rowwise", "fp8_blockwise", "mxfp8"):
        first, second = RECIPES[name].forward
        got, want = product(encode(x, first), encode(w, second), torch.float32), x @ w.T
        errors[name] = ((got - want).norm(dim=1) / want.norm(dim=1)).median().item()
    assert errors["fp8_tensorwise"] > 0.4
    for name in ("fp8_rowwise", "fp8_blockwise", "mxfp8"):
        assert errors[name] < errors["fp8_tensorwise"] / 10, (name, errors)


def test_what_is_not_finite_stays_so_and_zeros_stay_zeros():
    x = torch.ones(3, 64)
    x[1, 5] = torch.inf
    rows = encode(x, Scaling(E4M3, 1, 0)).values(torch.float32)
    assert rows[[0, 2]].eq(1).all() and rows[1].isnan().all()
    assert encode(x, Scaling(INT8, 0, 0)).values(torch.float32).isnan().all()
    assert encode(torch.zeros(3, 64), Scaling(E5M2, 1, 32, True)).values(torch.float32).eq(0).all()
    assert encode(torch.full((1, 8), 1e-40), Scaling(E4M3, 1, 0)).values(torch.float32).isfinite().all()
    assert largest(torch.empty(0, 4), Scaling(E4M3, 0, 0)).tolist() == [[0.0]]
    assert encode(torch.empty(4, 0), Scaling(E4M3, 1, 128)).codes.shape == (4, 0)


def by_hand(name: str, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """y, dx and dW from rounded matrices, each product written out."""

    def near(matrix, scaling):
        return matrix if scaling is None else encode(matrix, scaling).values(matrix.dtype)

    recipe = RECIPES[name]
    y = near(x, recipe.forward.first) @ near(w, recipe.forward.second).T
    again = near(w, recipe.forward.second) if recipe.straight else near(w.T, recipe.input_gradient.second).T
    dx = near(g, recipe.input_gradient.first) @ again
    dw = near(g.T, recipe.weight_gradient.first) @ near(x.T, recipe.weight_gradient.second).T
    return [y, dx, dw]


@pytest.mark.parametrize("name", RECIPES)
def test_the_three_products_of_a_linear_layer_follow_the_recipe(name):
    draw = torch.Generator().manual_seed(1)
    layer = Linear(160, 96, axes=(None, None), bias=True).double()
    nn.init.normal_(layer.weight, generator=draw)
    nn.init.normal_(layer.bias, generator=draw)
    x = torch.randn(2, 75, 160, dtype=torch.float64, generator=draw, requires_grad=True)
    g = torch.randn(2, 75, 96, dtype=torch.float64, generator=draw)
    plain = layer(x)
    layer.low = LowPrecision(RECIPES[name])
    y = layer(x)
    y.backward(g)
    want = by_hand(name, *(t.detach().flatten(0, -2) for t in (x, layer.weight, g)))
    for got, wanted in zip((y - layer.bias, x.grad, layer.weight.grad), want, strict=True):
        torch.testing.assert_close(got.detach().view(wanted.shape), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)))
    error = ((y - plain).norm() / plain.norm()).item()
    assert 1e-3 < error < 0.2, error


@pytest.mark.parametrize("name", NATIVE["cpu"])
def test_products_of_codes_are_those_of_their_values(name):
    """K of 75 and of 80: the device's own product is padded."""
    draw = torch.Generator().manual_seed(2)
    assert native(name, "cpu")
    for first, second in (RECIPES[name].forward, RECIPES[name].input_gradient, RECIPES[name].weight_gradient):
        if first is None:
            continue
        a, b = (torch.randn(n, 75, generator=draw) for n in (48, 32))
        codes = encode(a, first), encode(b, second)
        got, want = (product(*codes, torch.float32, native=way) for way in (True, False))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "natively"), [("mxfp8", False), ("int4_weights", False), ("int8", True)])
def test_an_expert_without_tokens_takes_part_in_a_recipe(name, natively):
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(3, 32, 64, generator=draw, requires_grad=True)
    rows, low = torch.randn(7, 32, generator=draw), LowPrecision(RECIPES[name], natively)
    y = low.grouped(rows, weight, torch.tensor([5, 5, 7]))
    y.sum().backward()
    assert torch.equal(y, torch.cat([low.linear(rows[:5], weight[0].T), low.linear(rows[5:], weight[2].T)]))
    assert [bool(each.any()) for each in weight.grad] == [True, False, True]


def test_results_of_a_recipe_are_kept_where_layers_are_computed_again():
    layer, low = Linear(32, 32, axes=(None, None)), LowPrecision(RECIPES["fp8_rowwise"])
    nn.init.ones_(layer.weight)
    layer.low, tape, x = low, Tape(), torch.randn(4, 32)
    with tape.recording():
        first = layer(x)
    assert tape.bytes == first.nbytes
    nn.init.zeros_(layer.weight)
    with tape.replay():
        assert layer(x).equal(first)


@pytest.mark.parametrize("name", ["fp8_tensorwise", "fp8_rowwise", "fp8_rowwise_wide"])
def test_fp8_recipes_equal_those_of_torchao(name):
    pytest.importorskip("torchao")
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    theirs = {"fp8_tensorwise": "tensorwise", "fp8_rowwise": "rowwise", "fp8_rowwise_wide": "rowwise_with_gw_hp"}
    config = Float8LinearConfig.from_recipe_name(theirs[name])
    emulated = ScaledMMConfig(emulate=True, use_fast_accum=False, fp8_output=False, pad_inner_dim=False)
    draw, found = torch.Generator().manual_seed(3), []
    x, w, g = (torch.randn(*shape, generator=draw) for shape in ((80, 64), (48, 64), (80, 48)))
    for ours in (True, False):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        if ours:
            y = LowPrecision(RECIPES[name]).linear(a, b)
        else:
            y = matmul_with_hp_or_float8_args.apply(a, b.t(), LinearMMConfig(*3 * (emulated,)), config)
        y.backward(g)
        found.append((y.detach(), a.grad, b.grad))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 2e-3 * want.norm()  # theirs may round a scale elsewhere
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


FOLLOW = {  # of each mixer, the layers that may follow a recipe
    **dict.fromkeys(
        ("deltanet", "gated_deltanet", "gated_deltanet2", "gated_deltaproduct", "gateloop", "gla", "kda", "lact"),
        "qkv out",
    ),
    **dict.fromkeys(("lightning", "linear", "retnet", "titans"), "qkv out"),
    **dict.fromkeys(("hgrn2", "lightnet", "slstm"), "out"),
    **dict.fromkeys(("longhorn", "mamba", "rglru"), "x out"),
    **dict.fromkeys(("mingru", "minlstm"), "h out"),
    **dict.fromkeys(("rwkv6", "rwkv7"), "r k v out"),
    "attention": "q kv out",
    "dsa": "q kv out",
    "gated_conv": "into out",
    "hgrn": "i out",
    "lru": "B C glu",
    "mamba2": "x bc out",
    "mamba3": "x bc out",
    "mla": "q_a q kv_a kv_b out",
    "mlstm": "q k v out",
    "mom": "qkv q k v x out",  # of the mixers that are its memories
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_policy_by_name(mixer):
    """With all of its options. A new mixer says here which of its layers bear few bits."""
    built = [build(case, device="meta") for case in CASES if case[0] == mixer]
    found = {each.name.rpartition(".")[2] for module in built for each in policy(module) if each.why is None}
    assert found == set(FOLLOW[mixer].split())


def test_feed_forwards_follow_but_for_routers_and_gates():
    with torch.device("meta"):
        model = composed(["model=qwen3_next_tiny"]).model.build()
    layers = {each.name: each for each in policy(model, 16)}
    high = {name.split(".")[-1]: each.why for name, each in layers.items() if each.why is not None}
    assert high == {
        "rates": "makes decays, gates or writing strengths",
        "gate": "gates an output",
        "shared_gate": "gates an output",
        "router": "chooses experts",
        "head": "makes logits",
    }
    assert layers["layers.0.ffn.experts.gate_up"].copies > 1
    untouched = {"embedding", "A_log", "dt_bias", "conv.weight", "norm.weight"}
    for name, _ in model.named_parameters():
        if any(name.endswith(each) for each in untouched):
            assert name.removesuffix(".weight") not in layers, name


def small(ffn) -> LM:
    block = partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=ffn)
    return LM(vocabulary=32, dim=40, layers=1, pattern=["x"], blocks={"x": block})


def test_patterns_and_widths_of_the_policy():
    model = small(partial(SwiGLU, hidden=48))
    by_tiles = {each.name: each.why for each in policy(model, 16, low=["*.gate"])}
    assert by_tiles["layers.0.mixer.qkv"] == "40 is no multiple of 16"
    assert by_tiles["layers.0.mixer.gate"] == "40 is no multiple of 16"
    opened = {each.name: each.why for each in policy(model, 8, low=["*.gate"], high=["*.ffn.*"])}
    assert opened["layers.0.mixer.gate"] is None and opened["layers.0.ffn.down"] == "precision.high"
    with pytest.raises(ValueError, match=r"precision.low=\*.gates: must match a linear layer"):
        policy(model, low=["*.gates"])


def test_a_recipe_reaches_the_layers_of_the_policy_and_no_other():
    model, low = (
        small(ffn=partial(MoE, num_experts=2, top_k=1, hidden=16, renormalise=False)),
        LowPrecision(RECIPES["int8"]),
    )
    apply(model, policy(model), low)
    has = {name for name, module in model.named_modules() if getattr(module, "low", None) is low}
    assert has == {"layers.0.mixer.qkv", "layers.0.mixer.out", "layers.0.ffn.experts"}
    apply(model, policy(model, high=["*.down"]), low)
    assert model.layers["0"].ffn.experts.low is None  # both products or neither


def test_settings_know_the_recipes():
    assert {"none", *RECIPES} == set(RecipeName.__args__)
    assert all(recipe.weight_gradient == Pair() for recipe in RECIPES.values() if recipe.straight)


def test_a_native_product_gets_rows_of_both_matrices():
    """As CUDA asks; the codes of a transposed matrix lie as that does."""
    asked, scaled = [], torch._scaled_mm

    def noting(first, second, *more, **options):
        asked.append(first.is_contiguous() and second.T.is_contiguous())
        return scaled(first, second, *more, **options)

    x, weight = torch.randn(32, 48, requires_grad=True), torch.randn(64, 48, requires_grad=True)
    with patch.object(torch, "_scaled_mm", noting):
        LowPrecision(RECIPES["fp8_tensorwise"], native=True).linear(x, weight).sum().backward()
    assert asked == [True] * 3
