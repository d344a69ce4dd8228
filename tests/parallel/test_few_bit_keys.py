"""`parallel.transport.keys`: keys and values in 8 bits between ranks, against one process that rounds them itself."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from models.kernels.low_precision import encode
from models.lm import LM
from parallel.schedule.comm_volume import How
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.sequence.attention import GatherKeys, Keys, MeshKeys, Ring, Ulysses
from parallel.sequence.attention.few_bits import KeyCodec
from parallel.sequence.attention.ring_ulysses import RowsAndColumns
from tests.parallel import test_volume
from tests.parallel.test_parity import BATCH, LENGTHS, static, unequal_pair, zigzag
from tests.parity import KEY_FORMATS, differences, mixer_model, rounding, spread, truth
from train.settings import TransportSettings

WINDOW = {"window": 9, "sinks": 3, "head_dim": 16}
LAST = MicroStep((Group((0, 1), (3,), (((0, 2),), ((2, 5),))),))  # a group of one would round nothing
ZIGZAG = Plan(0, tuple(LENGTHS), (*zigzag().micro_steps[:3], LAST))
LATENTS = partial(mixer_model, "mla", layers=2, heads=2)  # whose values are channels of their keys


def softmax(options: dict[str, Any]) -> Callable[[], LM]:
    """Two layers: what the first sends comes from all tokens, what the second sends from what the first received."""
    return partial(mixer_model, "attention", layers=2, **{"heads": 4, "kv_heads": 2, **options})


class Case(NamedTuple):
    """A model on some ranks, and the format that its keys and values get in one process."""

    format: str
    keys: Keys
    plan: Plan
    build: Callable[[], LM] = softmax({})


EVERYONE = (0, 1, 2, 3)
UNEQUAL = Plan(  # a rank of two spans, one of a single token, one of none
    0,
    tuple(LENGTHS),
    (
        MicroStep((Group(EVERYONE, (0, 2), (((0, 50), (78, 128)), ((50, 78),), ((128, 199),), ())),)),
        MicroStep((Group(EVERYONE, (1, 3), (((0, 1),), ((1, 80),), ((80, 82),), ((82, 138),))),)),
    ),
)
FEW = softmax({"heads": 2, "kv_heads": 1, "head_dim": 8})  # on four ranks of usp two by two, and keys in copies
CASES = {  # by ranks
    2: {
        "gather": Case("fp8", GatherKeys(2, "fp8"), ZIGZAG),
        "window": Case("fp8", GatherKeys(2, "fp8"), ZIGZAG, softmax(WINDOW)),
        "latents": Case("int8", GatherKeys(keys="int8"), unequal_pair(), LATENTS),
        "ring": Case("int8", Ring("int8"), ZIGZAG),
        "ring, latents": Case("fp8", Ring("fp8"), unequal_pair(), LATENTS),
        "ring, window": Case("int8", Ring("int8"), ZIGZAG, softmax(WINDOW)),
        "ulysses": Case("int8", Ulysses("int8"), ZIGZAG),
        "usp, unequal": Case("fp8", MeshKeys("fp8"), unequal_pair()),
    },
    4: {
        "ring": Case("int8", Ring("int8"), UNEQUAL),
        "ring, fp8": Case("fp8", Ring("fp8"), static(1, 4)),
        "ulysses": Case("fp8", Ulysses("fp8"), UNEQUAL),  # four heads, and two of keys in copies
        "usp": Case("fp8", MeshKeys("fp8"), UNEQUAL, FEW),
        "usp, latents": Case("int8", MeshKeys("int8"), UNEQUAL, LATENTS),
    },
}
PAIRS = [How("gather", name, test_volume.BLOCKS, 2, "fp8") for name in ("gather", "ring", "ulysses", "usp")]
MODEL = {2: (2, 2, ("attention", "window")), 4: (2, 1, ("attention",))}  # of a count: on four ranks usp is two by two


def counts(ranks: int) -> dict[str, How]:
    """The transports whose bytes are counted, by name. Two heads are too few for Ulysses on four ranks."""
    return {how.attention: how for how in PAIRS if ranks == 2 or how.attention != "ulysses"}


def round_again_at_every_hop():
    """By scales that are no powers of two, as a hop would have that agreed on nothing with the rank that sent."""
    honest = RowsAndColumns.turn

    def turn(self, *messages, purpose):
        if messages[0].dtype == torch.uint8:
            codec, widths = KeyCodec("fp8"), ((messages[0].shape[-1] - 2) // 2,) * 2
            numbers = codec.unpacked(messages[0], widths, torch.float64)
            scaling = codec.scaling._replace(power=False)
            both = [encode(x.reshape(-1, x.shape[-1]), scaling) for x in numbers.chunk(2, -1)]
            again = torch.cat([x.values(torch.float64) for x in both], -1).view(numbers.shape)
            messages = (codec.packed(again, widths),)
        return honest(self, *messages, purpose=purpose)

    return patch.object(RowsAndColumns, "turn", turn)


def lose_what_a_hop_brings_of_the_gradient():
    honest = RowsAndColumns.turn

    def turn(self, *tensors, purpose):
        arrive = honest(self, *tensors, purpose=purpose)
        return arrive if purpose == "keys and values" else lambda: [0 * x for x in arrive()]

    return patch.object(RowsAndColumns, "turn", turn)


BROKEN = (round_again_at_every_hop, lose_what_a_hop_brings_of_the_gradient)


def on_ranks(ranks: int):
    """What each case gives; what the ring gives where a mechanism is broken; bytes and calls."""
    cases = CASES[ranks]
    found = {name: spread(BATCH, case.plan, "fp64", build=case.build, keys=case.keys) for name, case in cases.items()}
    wrong = {}
    for break_it in BROKEN if ranks == 4 else ():
        with break_it():
            case = cases["ring, fp8"]
            wrong[break_it.__name__] = spread(BATCH, case.plan, "fp64", build=case.build, keys=case.keys)
    plan, build = test_volume.plans(ranks)["zigzag"], partial(test_volume.model, *MODEL[ranks])
    volumes = {name: test_volume.counted(build, plan, how) for name, how in counts(ranks).items()}
    return found, wrong, volumes


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one_process_that_rounds_and_receive_the_foretold_bytes(run, ranks):
    measured = run(ranks, on_ranks, ranks)
    truths = {}
    for name, case in CASES[ranks].items():
        if (key := (case.format, id(case.build))) not in truths:
            with rounding(case.format):
                rounded = truth(BATCH, "fp64", build=case.build)
            truths[key] = rounded, truth(BATCH, "fp64", build=case.build)
        want, plain = truths[key]
        for got, _, _ in measured:
            errors = differences(got[name], want)
            assert max(errors.values()) < 1e-10, (name, max(errors, key=errors.get), max(errors.values()))
            assert max(differences(got[name], plain).values()) > 1e-4, f"{name}: nothing was rounded"
    for mutation in BROKEN if ranks == 4 else ():
        want, _ = truths["fp8", id(CASES[4]["ring, fp8"].build)]
        for _, wrong, _ in measured:
            assert max(differences(wrong[mutation.__name__], want).values()) > 1e-5, mutation.__name__
    for name, how in counts(ranks).items():
        want = test_volume.predicted(MODEL[ranks], test_volume.plans(ranks)["zigzag"], how)
        assert [volumes[name] for _, _, volumes in measured] == want, name
        exact = test_volume.predicted(MODEL[ranks], test_volume.plans(ranks)["zigzag"], replace(how, keys="exact"))
        for (few, _), (whole, _) in zip(want, exact, strict=True):  # four channels and an exponent for sixteen bytes
            assert few["sequence/keys and values"] == whole["sequence/keys and values"] * 5 // 16, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KEY_FORMATS)
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
