"""`farspan plan precision.report=true`: its decibels against roundings written here from the formats' definitions, its
gains against arithmetic by hand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.cli import main
from launch.config.compose import composed
from launch.preflight.check import check_run
from models.axes import initialise
from models.linear import Linear
from models.sequence import Whole
from tests.jobs import overrides
from train.loss import sums
from train.precision_report import TOKENS, gain, with_weights

E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
)
E4M3 = E4M3[:-1]  # the last is no number


def int8_rows(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(1, keepdims=True) / 127
    return np.rint(np.divide(x, scale, where=scale > 0, out=np.zeros_like(x))) * scale


def e4m3_rows(x: np.ndarray) -> np.ndarray:
    """A scale a row, the least power of two by which no value is above 448."""
    largest = np.abs(x).max(1, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest, 1) / 448))
    size = np.abs(x) / scale
    above = np.clip(np.searchsorted(E4M3, size), 1, len(E4M3) - 1)
    low, high = E4M3[above - 1], E4M3[above]
    up = (size - low > high - size) | (size - low == high - size) & (above % 2 == 0)
    return np.sign(x) * np.where(up, high, low) * scale


def decibels(x: torch.Tensor, rounded) -> float:
    """The lower of the matrix's and its transpose's, since every matrix enters two products."""
    rows = x.detach().flatten(0, -2).double().numpy()
    return min(10 * np.log10((y**2).sum() / ((rounded(y) - y) ** 2).sum()) for y in (rows, rows.T))


def looked_at(folder: Path) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor]]:
    """Records each linear layer of the run's model by hooks of torch: weight, input, gradient of the output; and every
    weight."""
    config = composed(overrides(folder))
    flight, seen = check_run(config, lambda line: None), {}
    model, sample = initialise(config.model.build(), config.seed), flight.batches.batch(config.seed, 0)[0]
    for name, module in model.named_modules():
        if type(module) is Linear:  # a router hands on more than its product
            seen[name] = [module.weight]
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
            module.register_full_backward_hook(lambda _, inputs, grads, name=name: seen[name].append(grads[0]))
    tokens, targets, positions = (torch.from_numpy(x)[None] for x in (sample.tokens, sample.targets, sample.positions))
    sums(model(tokens, Whole.of(positions), targets)).cross_entropy.backward()
    assert tokens.shape[1] <= TOKENS
    return {name: several for name, several in seen.items() if len(several) == 3}, dict(model.named_parameters())


@pytest.mark.composes
def test_a_plan_prints_each_layers_signal_to_noise_and_which_follow(tmp_path, capsys):
    want, weights = looked_at(tmp_path)
    assert any(".ffn.shared." in name for name in want) and "layers.1.mixer.out" in want
    for recipe, rounded in (("int8", int8_rows), ("fp8_rowwise", e4m3_rows)):
        given = [o for o in overrides(tmp_path) if o != "precision=fp32"]
        assert main(["plan", *given, f"precision={recipe}", "precision.report=true"]) == 0
        out = capsys.readouterr().out
        assert "96 tokens with its first weights" in out and " tokens a micro-step on H100 SXM" in out
        found = {}
        for line in out.partition("rounding")[2].splitlines():
            if row := re.match(r" +(\S+) +(?:\d+ of )?([\d,]+) x ([\d,]+) +(\S+) +(\S+) +(\S+) +(\S+)  (.*)", line):
                found[row[1]] = [row[i] for i in (4, 5, 6)], row[8]
        for name, matrices in want.items():
            near = [abs(float(a) - decibels(b, rounded)) for a, b in zip(found[name][0], matrices, strict=True)]
            assert max(near) < 0.051, f"{recipe}, {name}: {found[name]}"
        for name, (numbers, _) in found.items():
            if ".experts." in name:  # one an expert: the worst of all
                worst = min(decibels(each, rounded) for each in weights[name])
                assert abs(float(numbers[0]) - worst) < 0.051 and all(20 < float(n) < 50 for n in numbers)
        assert found["layers.1.mixer.out"][1] == "follows, and would not pay"
        assert found["head"][1] == "high: makes logits"
    spread = {found[name][0][1] for name in want}
    assert len(spread) > 1, "one number for all layers would pass"


@pytest.mark.composes
def test_without_a_recipe_a_plan_compares_them_all(tmp_path, capsys):
    assert main(["plan", *overrides(tmp_path), "precision.report=true"]) == 0
    lines = capsys.readouterr().out.partition("rounding")[2].splitlines()
    names, row = lines[1].split(), next(line for line in lines if "layers.1.mixer.out" in line).split()
    found = dict(zip(names[4:], row[4:], strict=False))
    assert found["fp8_blockwise"] == "-"  # 32 is no multiple of 128
    assert float(found["int4_weights"]) < float(found["fp8_tensorwise"]) < float(found["int8_weights"])
    assert row[-2:] == ["may", "follow"]


def test_gains_are_those_of_arithmetic_by_hand():
    # 8,192 tokens, 4,096 x 4,096: a product is 0.2749 TFLOP, 0.5559 ms at half of 989 TFLOP/s. Codes in fp8_rowwise: of
    # x and of the gradient 2 x 33.6M values at 5 bytes each, of the weight 2 x 16.8M at 9: 973 MB, 0.3631 ms at 0.8 of
    # 3.35 TB/s. Without: a cast of 16.8M weights at 6 bytes, 0.0376 ms. (3 x 0.5559 + 0.0376) / (1.5 x 0.5559 + 0.3631)
    assert gain("fp8_rowwise", (4096, 4096), 8192, "h100") == pytest.approx(1.7052 / 1.1969, rel=2e-4)
    assert gain("fp8_rowwise", (128, 4096), 8192, "h100") < 1 < gain("fp8_rowwise", (16384, 4096), 8192, "h100") < 2
    wide = gain("fp8_rowwise_wide", (4096, 4096), 8192, "h100")
    assert 1 < wide < gain("fp8_rowwise", (4096, 4096), 8192, "h100")
    assert gain("fp8_rowwise", (4096, 4096), 8192, "a100") is None and gain("int8", (4096, 4096), 8192, "a100") > 1
    assert gain("int4_weights", (4096, 4096), 8192, "h100") is None


def test_a_model_too_large_to_be_run_here_is_refused_in_one_line():
    with torch.device("meta"):
        model = composed(["model.dim=8192", "model.layers=4"]).model.build()
    with pytest.raises(ValueError, match=r"^precision.report=true: runs the model on this machine, and it has [\d,]+ "):
        with_weights(model, 0)
