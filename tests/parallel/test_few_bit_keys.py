"""`parallel.transport.keys`: keys and values in 8 bits between ranks, against one process that rounds them itself."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from models.lm import LM
from models.sequence import Whole
from parallel.schedule.comm_volume import How
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.sequence.attention import GatherKeys
from parallel.sequence.attention.few_bits import KeyCodec
from tests.parallel import test_volume
from tests.parallel.test_parity import BATCH, LENGTHS, unequal_pair, zigzag
from tests.parity import differences, mixer_model, spread, truth
from train.settings import TransportSettings

WINDOW = {"window": 9, "sinks": 3, "head_dim": 16}
LAST = MicroStep((Group((0, 1), (3,), (((0, 2),), ((2, 5),))),))  # a group of one would round nothing
ZIGZAG = Plan(0, tuple(LENGTHS), (*zigzag().micro_steps[:3], LAST))
CASES = {  # the format, the plan, and options of attention
    "fp8": ("fp8", ZIGZAG, {}),
    "int8, unequal spans": ("int8", unequal_pair(), {}),
    "fp8 in a window": ("fp8", ZIGZAG, WINDOW),
}
LATENTS = partial(mixer_model, "mla", layers=2, heads=2)  # whose values are channels of their keys
FORMATS = {"fp8": 448.0, "int8": 127.0}  # and their largest numbers


def softmax(options: dict[str, Any]) -> Callable[[], LM]:
    """Two layers: what the first sends comes from all tokens, what the second sends from what the first received."""
    return partial(mixer_model, "attention", layers=2, heads=4, kv_heads=2, **options)


def near(x: torch.Tensor, name: str) -> torch.Tensor:
    """x [..., W] by a scale a row, the least power of two that cuts nothing off: whole numbers, or numbers of four
    significant bits down to 2^-9 (OCP 8-bit floating point, E4M3). Its gradient is x's."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.exp2((largest / FORMATS[name]).clamp_min(1e-37).log2().ceil())
    y = x.detach() / scale
    step = torch.exp2(y.abs().clamp_min(2.0**-6).log2().floor() - 3) if name == "fp8" else torch.ones_like(y)
    return x + ((y / step).round() * step * scale - x.detach())


def rounding(name: str):
    whole = Whole.attend

    def attend(seq, q, k, v, **more):
        k = near(k, name)
        return whole(seq, q, k, k[..., : v.shape[-1]] if more.get("values_in_keys") else near(v, name), **more)

    return patch.object(Whole, "attend", attend)


def on_ranks():
    found = {
        name: spread(BATCH, plan, "fp64", build=softmax(options), keys=GatherKeys(2, keys))
        for name, (keys, plan, options) in CASES.items()
    }
    found["latents"] = spread(BATCH, unequal_pair(), "fp64", build=LATENTS, keys=GatherKeys(keys="int8"))
    plan, build = test_volume.plans(2)["zigzag"], partial(test_volume.model, 12, 12, test_volume.FEW)
    how = How("gather", "gather", test_volume.BLOCKS, 2)
    return found, {keys: test_volume.counted(build, plan, replace(how, keys=keys)) for keys in ("exact", "fp8")}


@pytest.mark.dist
def test_two_ranks_equal_one_process_that_rounds_and_receive_the_foretold_bytes(run):
    measured = run(2, on_ranks)
    cases = {name: (keys, softmax(options)) for name, (keys, _, options) in CASES.items()}
    for name, (keys, build) in {**cases, "latents": ("int8", LATENTS)}.items():
        plain = truth(BATCH, "fp64", build=build)
        with rounding(keys):
            want = truth(BATCH, "fp64", build=build)
        for got, _ in measured:
            errors = differences(got[name], want)
            assert max(errors.values()) < 1e-10, (name, max(errors, key=errors.get), max(errors.values()))
            assert max(differences(got[name], plain).values()) > 1e-4, f"{name}: nothing was rounded"
    for keys in ("exact", "fp8"):
        how = How("gather", "gather", test_volume.BLOCKS, 2, keys)
        want = test_volume.predicted((12, 12, test_volume.FEW), test_volume.plans(2)["zigzag"], how)
        assert [volumes[keys] for _, volumes in measured] == want, keys
    exact, few = (measured[0][1][keys][0]["sequence/keys and values"] for keys in ("exact", "fp8"))
    assert few == exact * 5 // 16  # four channels and an exponent in place of sixteen bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_message_says_what_was_rounded_and_rounds_no_more(name, dtype):
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 5, 2, 24, generator=draw) * torch.logspace(-30, 30, 5)[:, None, None]).to(dtype)
    x[0, 0, 0], x[1, 1, 1, 3], x[2, 2, 0, 1] = 0.0, torch.nan, torch.inf
    codec = KeyCodec(name)
    y = codec.rounded(x)
    message = codec.packed(y, (16, 8))
    assert message.dtype == torch.uint8 and message.shape == (3, 5, 2, 26)
    again = codec.unpacked(message, (16, 8), dtype)
    of_finite = y.isfinite().all(-1)
    assert of_finite.sum() == 28 and torch.equal(again[of_finite], y[of_finite])
    assert again[1, 1, 1, :16].isnan().all() and again[2, 2, 0, :16].isnan().all(), "what is no number stays none"


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^parallel.transport.keys=fp4: must be one of exact, fp8, int8$"):
        TransportSettings(keys="fp4")
    line = "^parallel.transport.keys=int8: must be exact with parallel.transport.attention=ring; gather sends few bits$"
    with pytest.raises(ValueError, match=line):
        TransportSettings(keys="int8", attention="ring")
