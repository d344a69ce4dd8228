"""What a run says of its layout as it begins."""

from functools import partial

import pytest

from models.block import Block
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from train.layout import dependences
from train.settings import TrainSettings


def model(**options) -> LM:
    ffn = partial(MoE, num_experts=4, top_k=2, hidden=8, **options)
    blocks = {"gla": partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=ffn)}
    return LM(vocabulary=8, dim=16, layers=2, pattern=["gla"], blocks=blocks)


@pytest.mark.parametrize(
    ("options", "train", "keys"),
    [
        ({}, {}, []),
        ({"balance": "batch", "bias_rate": 0.1}, {"span_tokens": 64, "z_weight": 0.1, "clip_each": 1.0}, []),
        ({}, {"span_gradient": "truncated"}, []),  # without spans, there is nothing to cut
        ({"capacity_factor": 1.25}, {}, ["capacity_factor=1.25"]),
        ({}, {}, ["parallel.transport.keys=int8"]),
        ({}, {}, ["engine.gradients=bf16"]),
        ({}, {"span_gradient": "truncated", "span_tokens": 64}, ["train.span_gradient=truncated"]),
        (
            {"capacity_factor": 2.0},
            {"span_gradient": "truncated", "span_tokens": 64},
            ["capacity_factor=2", "train.span_gradient=truncated"],
        ),
    ],
)
def test_each_option_that_makes_a_run_depend_on_its_layout_is_said_in_a_line(options, train, keys):
    formats = ("int8" if "parallel" in str(keys) else "exact", "bf16" if "engine" in str(keys) else "high")
    found = dependences(model(**options), TrainSettings(**train), *formats)
    assert [line.split(":")[0] for line in found] == keys
    assert all(line.endswith("so the loss depends on the layout") and "\n" not in line for line in found)
