"""Recipes of few bits on two ranks, which share sequences or shards of weights, against one process."""

from functools import partial

import pytest

from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.recipes import RECIPES
from parallel.schedule.static import Static
from tests.parity import VOCABULARY, Sample, assert_close, spread, truth

pytestmark = pytest.mark.dist

# Ranks' spans begin at multiples of 128, the most tokens that share a scale.
BATCH = [Sample((40, 24, 1, 1, 2, 60, 100, 28)), Sample((130, 3, 123), masked=(60, 133), seed=3)]
FEW = ("fp8_tensorwise", "fp8_blockwise")  # a scale of all tokens, and one of some
LENGTHS = [len(s.tokens) for s in BATCH]
PLANS = {"sequence": Static(tokens_per_rank=128, layout="contiguous").plan(0, LENGTHS, data=1, sequence=2)}
PLANS["data"] = Static(tokens_per_rank=256).plan(0, LENGTHS, data=2, sequence=1)


def hybrid() -> LM:
    """Gated DeltaNet with experts, and attention with a dense feed-forward."""
    ffn = {"gdn": partial(MoE, num_experts=4, top_k=2, hidden=12, shared_hidden=8), "attn": partial(SwiGLU, hidden=24)}
    mixers = {
        "gdn": partial(MIXERS["gated_deltanet"], heads=2),
        "attn": partial(MIXERS["attention"], heads=4, kv_heads=2),
    }
    blocks = {name: partial(Block, mixer=mixer, ffn=ffn[name]) for name, mixer in mixers.items()}
    return LM(vocabulary=VOCABULARY, dim=32, layers=2, pattern=["gdn", "attn"], blocks=blocks)


def on_two_ranks(recipes: tuple[str, ...]) -> dict:
    found = {}
    for recipe in recipes:
        for name, plan in PLANS.items():
            remat = "selective" if name == "sequence" else "none"
            found[recipe, name] = spread(BATCH, plan, "fp64", remat, build=hybrid, recipe=recipe)
    found["broken"] = spread(BATCH, PLANS["sequence"], "fp64", build=hybrid, recipe="fp8_tensorwise", scales="rank")
    return found


@pytest.mark.parametrize(
    "recipes", [FEW, pytest.param(tuple(name for name in RECIPES if name not in FEW), marks=pytest.mark.slow)]
)
def test_loss_and_gradients_equal_one_process(run, recipes):
    """Each recipe; and a scale of a rank's tokens alone is seen."""
    want = {recipe: truth(BATCH, "fp64", build=hybrid, recipe=recipe) for recipe in recipes}
    plain = truth(BATCH, "fp64", build=hybrid)[0]
    broken = truth(BATCH, "fp64", build=hybrid, recipe="fp8_tensorwise")
    assert all(1e-5 < abs(loss - plain) < 0.2 for loss, _ in want.values())
    for got in run(2, on_two_ranks, recipes):
        for recipe in recipes:
            for name in PLANS:
                try:
                    assert_close(got[recipe, name], want[recipe], "fp64")
                except AssertionError as error:
                    raise AssertionError(f"{recipe}, {name}: {error}") from None
        with pytest.raises(AssertionError):
            assert_close(got["broken"], broken, "fp64")
