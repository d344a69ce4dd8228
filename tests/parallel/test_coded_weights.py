"""`precision.gather=codes`: weights that two ranks gather as bytes, against one process that rounds them whole; and
`engine.gradients=bf16`, against parts that one process rounds and adds up."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from models import recipes
from models.dispatch import Here
from models.kernels.coded_weight import CodedWeight
from models.kernels.low_precision import encode
from models.linear import Linear
from models.moe import Experts
from models.recipes import RECIPES, LowPrecision, policy
from parallel import coded_weights
from parallel.collectives import LEDGER
from parallel.fsdp import shard
from parallel.schedule.comm_volume import SCALES, Unit, of_weights
from tests.parallel.test_recipes import BATCH, PLANS, hybrid
from tests.parity import assert_close, spread, truth
from train.metrics.comm_trace import weight_units
from train.precision import follow, gathered_weights
from train.settings import PrecisionSettings

RECIPES_OF_CODES = [name for name, recipe in RECIPES.items() if recipe.weight is not None]
# Outputs and inputs: rows that two ranks cannot halve, one row alone, blocks of 128 that lie on both ranks.
WIDTHS = ((5, 40), (1, 5), (300, 1), (7, 300))


def chain(recipe: str, gather: bool) -> nn.Sequential:
    """Linear layers of these widths, a bias in one of them, all of which follow a recipe."""
    draw = torch.Generator().manual_seed(3)
    layers = []
    for i, (outputs, inputs) in enumerate(WIDTHS):
        layer = Linear(inputs, outputs, axes=(None, None), bias=i == 2)
        layer.low = LowPrecision(RECIPES[recipe], gather=gather)
        for p in layer.parameters():
            p.data = torch.randn(p.shape, generator=draw) * 10.0 ** torch.arange(len(p)).view(
                -1, *[1] * (p.dim() - 1)
            ).fmod(4)
        layers.append(layer)
    return nn.Sequential(*layers)


def stepped(model: nn.Sequential) -> dict[str, Any]:
    """Output and gradients after the weights have changed once, as an optimizer changes them."""
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(4))
    model(x).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    whole = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()}
    return {name: x.numpy() for name, x in {"output": y.detach(), **whole}.items()}


def sharded(recipe: str, gather: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """The same on this world, and bytes that this rank has received, by purpose."""
    model = chain(recipe, gather)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard(model, list(model), mesh, reshard_after_forward=True)
    coded_weights.gather_in_few_bits(model, mesh)
    LEDGER.take()
    found = stepped(model)
    if gather:
        model[0].weight._local_tensor.mul_(2)
        with pytest.raises(RuntimeError, match="0.weight: its scales are of other weights"):
            model[0](torch.zeros(1, 40))
    return found, {purpose: count for (_, purpose), count in LEDGER.take()[0].items()}


def experts(recipe: str, gather: bool) -> Experts:
    """Three experts, which two ranks cannot halve, of widths that every format tiles; one is 1,000 times the others."""
    draw, made = torch.Generator().manual_seed(5), Experts(3, 128, 128)
    made.low = LowPrecision(RECIPES[recipe], gather=gather)
    for p in (made.gate_up, made.down):
        p.data = torch.randn(p.shape, generator=draw) * torch.tensor([1.0, 1e3, 1.0]).view(3, 1, 1)
    return made


def stepped_experts(model: Experts) -> dict[str, np.ndarray]:
    """Output and gradients of tokens that go to two experts each."""
    draw = torch.Generator().manual_seed(6)
    x, weights = torch.randn(9, 128, generator=draw), torch.rand(9, 2, generator=draw)
    choices = torch.tensor([[i % 3, (i + 1) % 3] for i in range(9)])
    y, _ = model(x, choices, weights, Here(), lambda: None, None)
    y.square().mean().backward()
    whole = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()}
    return {name: x.numpy() for name, x in {"output": y.detach(), **whole}.items()}


def sharded_experts(recipe: str, gather: bool) -> tuple[dict[str, Any], dict[str, int]]:
    model, mesh = experts(recipe, gather), init_device_mesh("cpu", (dist.get_world_size(),))
    shard(model, [], mesh, reshard_after_forward=True)
    coded_weights.gather_in_few_bits(model, mesh)
    LEDGER.take()
    found = stepped_experts(model)
    return found, {event.purpose: count for event, count in LEDGER.take()[0].items()}


def experts_on_two_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {name: sharded_experts(name, True) for name in RECIPES_OF_CODES}
    found["high"] = sharded_experts("fp8_tensorwise", False)
    with patch.object(coded_weights.dist, "all_reduce"):  # scales of a rank's own experts alone
        found["apart"] = sharded_experts("fp8_tensorwise", True)
    return found


@pytest.mark.dist
def test_experts_weights_travel_as_codes_bit_for_bit(run):
    """Each expert with scales of its own; a quarter of the bytes."""
    want = {name: stepped_experts(experts(name, False)) for name in RECIPES_OF_CODES}
    for got in run(2, experts_on_two_ranks):
        for name in RECIPES_OF_CODES:
            values, _ = got[name]
            assert np.array_equal(values["output"], want[name]["output"]), name
            for parameter in ("gate_up", "down"):  # both ranks have the same tokens
                assert np.array_equal(values[parameter], 2 * want[name][parameter]), (name, parameter)
        assert 4 * got["fp8_tensorwise"][1]["weights"] == got["high"][1]["weights"]
        assert not np.array_equal(got["apart"][0]["output"], want["fp8_tensorwise"]["output"])


def test_every_recipe_of_codes_has_them_alike_in_both_products():
    """One matrix, rounded once, is what both products read; the others have two."""
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    for name, recipe in RECIPES.items():
        first, second = recipe.forward.second, recipe.input_gradient.second
        if recipe.straight or recipe.delayed:  # scales of earlier steps are not of the weight that is there
            assert recipe.straight == (name in RECIPES_OF_CODES)
            continue
        alike = torch.equal(
            encode(weight, first).values(torch.float32).T, encode(weight.T, second).values(torch.float32)
        )
        assert alike == (name in RECIPES_OF_CODES), name
    assert RECIPES_OF_CODES == ["fp8_tensorwise", "fp8_blockwise", "int8_weights", "int4_weights"]


def plain() -> nn.Sequential:
    model = chain("int8_weights", False)
    for layer in model:
        layer.low = None
    return model


def reduced(gradients: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Gradients of layers without a recipe, of other tokens on each rank, and bytes received by purpose."""
    model = plain()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard(model, list(model), mesh, reshard_after_forward=True, gradients=gradients)
    LEDGER.take()
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(dist.get_rank()))
    model(x).square().mean().backward()
    found = {n: p.grad.full_tensor().numpy() for n, p in model.named_parameters()}
    return found, {purpose: count for (_, purpose), count in LEDGER.take()[0].items()}


def on_two_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {name: sharded(name, True) for name in RECIPES_OF_CODES}
    found["high"] = sharded("fp8_tensorwise", False)
    with patch.object(coded_weights.dist, "all_reduce"):  # the scales of a rank's own rows
        found["apart"] = sharded("fp8_tensorwise", True)
    found["reduced"] = {name: reduced(name) for name in ("high", "bf16")}
    LEDGER.take()
    found["model"] = spread(BATCH, PLANS["data"], "fp64", "full", build=hybrid, recipe="fp8_tensorwise", gather=True)
    found["bytes"], found["calls"] = ({e.purpose: n for e, n in part.items()} for part in LEDGER.take())
    return found


@pytest.mark.dist
def test_two_ranks_round_as_one_process_bit_for_bit_and_send_bytes(run):
    want = {name: stepped(chain(name, False)) for name in RECIPES_OF_CODES}
    whole = truth(BATCH, "fp64", build=hybrid, recipe="fp8_tensorwise")
    with torch.device("meta"):
        model = hybrid()
    followed = [layer.name for layer in policy(model) if layer.why is None]
    coded = {name if "experts" in name else f"{name}.weight": RECIPES["fp8_tensorwise"].weight for name in followed}
    told = of_weights(weight_units(model, itemsize=8, reshard=True, coded=coded), 2, len(PLANS["data"].micro_steps))
    for got in run(2, on_two_ranks):
        for name in RECIPES_OF_CODES:
            values, _ = got[name]
            assert np.array_equal(values["output"], want[name]["output"]), name
            for parameter, gradient in list(want[name].items())[1:]:  # both ranks have the same tokens
                assert np.array_equal(values[parameter], 2 * gradient), (name, parameter)
        codes, high = (got[name][1] for name in ("fp8_tensorwise", "high"))
        bias = 4 * 4 * 150  # four gathers of one layer's
        assert codes["weights"] - bias == (high["weights"] - bias) // 4 and (high["weights"] - bias) % 4 == 0
        assert codes["weights gradient"] == high["weights gradient"] and SCALES not in high
        assert not np.array_equal(got["apart"][0]["output"], want["fp8_tensorwise"]["output"])
        for name, dtype in (("high", torch.float32), ("bf16", torch.bfloat16)):
            for parameter, gradient in added([alone(0), alone(1)], dtype).items():
                assert np.array_equal(got["reduced"][name][0][parameter], gradient), (name, parameter)
        wide, few = (got["reduced"][name][1] for name in ("high", "bf16"))
        assert few["weights gradient"] * 2 == wide["weights gradient"] and few["weights"] == wide["weights"]
        units = [
            Unit(tuple((len(p), p[0].numel()) for p in layer.parameters()), 4, False, gradients="bf16")
            for layer in plain()
        ]
        assert few["weights gradient"] == of_weights(units, 2, 1).bytes["weights gradient"]
        assert_close(got["model"], whole, "fp64")
        for purpose in ("weights", "weights gradient", SCALES):
            assert (got["bytes"][purpose], got["calls"][purpose]) == (told.bytes[purpose], told.calls[purpose]), purpose


def added(rank_gradients: list[dict[str, torch.Tensor]], dtype: torch.dtype) -> dict[str, np.ndarray]:
    return {n: sum(g[n].to(dtype).float() for g in rank_gradients).numpy() for n in rank_gradients[0]}


def alone(rank: int) -> dict[str, torch.Tensor]:
    """The gradients of a rank's tokens."""
    model = plain()
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(rank))
    model(x).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_the_plan_and_the_run_mean_the_same_weights():
    """Experts' and a dense feed-forward's, whose parts have the same names."""
    with torch.device("meta"):
        model = hybrid()
    settings = PrecisionSettings(masters="bf16")
    foretold = gathered_weights(settings, model, "cpu")
    follow(settings, model, "cpu")
    assert set(foretold) == {each.name for each in recipes.gathered_weights(model)}
    assert set(foretold) <= {name for name, _ in model.named_parameters()}
    assert {"layers.0.ffn.experts.down", "layers.1.ffn.down.weight"} <= set(foretold)


def test_a_weight_of_codes_is_read_by_its_recipe_alone():
    weight = CodedWeight(encode(torch.ones(4, 4), RECIPES["fp8_tensorwise"].weight), torch.Size((4, 4)), torch.float32)
    for read in (lambda: weight + 1, lambda: weight.double(), lambda: weight @ weight):
        with pytest.raises(RuntimeError, match="reads the numbers of a weight that is there as codes"):
            read()
