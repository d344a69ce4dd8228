"""Mixers of the registry across ranks, against one process: loss and every gradient on every rank."""

import inspect
from functools import partial

import pytest

from models.block import Block
from models.ffn import ChannelMix
from models.lm import LM
from models.mixers import MIXERS
from tests.models.test_mixers import NEEDED
from tests.parallel.test_parity import BATCH, static, unequal
from tests.parity import VOCABULARY, assert_close, mixer_model, spread, truth

pytestmark = pytest.mark.dist

BUILDS = {
    name: partial(mixer_model, name, **{k: v for k, v in NEEDED.items() if k in inspect.signature(mixer).parameters})
    for name, mixer in sorted(MIXERS.items())
}


def goose() -> LM:
    """RWKV-7 whole: its channel mix as well sees a token of the span before."""
    block = partial(Block, mixer=partial(MIXERS["rwkv7"], heads=2), ffn=partial(ChannelMix, hidden=24, receptance=True))
    return LM(vocabulary=VOCABULARY, dim=16, layers=2, pattern=["layer"], blocks={"layer": block})


BUILDS["rwkv7, channel mix"] = goose
BUILDS |= {  # options that take another path over ranks
    "mom, one norm": partial(mixer_model, "mom", heads=2, memories=2, norm_after=True),
    "attention, norms over all heads": partial(
        *(mixer_model, "attention"),
        **{"heads": 4, "kv_heads": 2, "qk_norm": True, "norm_heads": "all", "qkv_bias": True, "out_bias": True},
        scale=0.3,
    ),
    "mla, keys of every head": partial(mixer_model, "mla", heads=2, absorb=False, query_rank=6),
    "mamba, norms": partial(mixer_model, "mamba", inner_norm="weighted"),
    "gla, no convolution": partial(mixer_model, "gla", heads=2, conv=None, feature="elu"),
    "rglru, biases, no convolution": partial(mixer_model, "rglru", heads=2, conv=None, bias=True),
}
LAYOUTS = {
    "2 ranks": (2, static(1, 2), "none"),
    "4 ranks, unequal spans, recomputed": (4, unequal(), "full"),
}
# Those whose layers share something, and a state that is no affine map's: all others are in the matrix.
EVERY_RUN = ("mom, one norm", "rwkv7, channel mix", "slstm", "attention, norms over all heads", "mla")


def mixers(names, plan, remat):
    return {name: spread(BATCH, plan, "fp64", remat=remat, build=BUILDS[name]) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, names",
    [
        ("4 ranks, unequal spans, recomputed", EVERY_RUN),
        *((layout, tuple(BUILDS)) for layout in LAYOUTS),
    ],
)
def test_mixers_give_the_loss_and_gradients_of_one_process(run, layout, names):
    """One world for all of them: packed unequal documents, three layers, so that what layers share is shared."""
    world, plan, remat = LAYOUTS[layout]
    want = {name: truth(BATCH, "fp64", build=BUILDS[name]) for name in names}
    for got in run(world, mixers, names, plan, remat):
        for name in names:
            try:
                assert_close(got[name], want[name], "fp64")
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
