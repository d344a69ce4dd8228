"""Rotary positions and their rules: against `transformers` where it has them, else against the papers' formulas."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.positions import (
    Interpolated,
    Llama3,
    LongRoPE,
    NoPE,
    NTKAware,
    Randomized,
    RoPE,
    Truncated,
    YaRN,
    rotate,
    turn,
)
from models.sequence import DocumentKey, Whole
from parallel.collectives import Comm
from parallel.schedule.plan import Group
from parallel.sequence import TRANSPORTS
from parallel.sequence.place import place
from tests.parity import Sample

K = 64
SHORT, LONG = [1 + i / 50 for i in range(K // 2)], [1 + i for i in range(K // 2)]


def theirs(kind, *, base=10_000.0, length=8192, seq_len=None, fraction=1.0, **options):
    """Inverse frequencies (fp32) and attention factor, as `transformers` initialises them."""
    rule = {"rope_type": kind, "rope_theta": base, "partial_rotary_factor": fraction, **options}
    config = LlamaConfig(hidden_size=4 * K, num_attention_heads=4, max_position_embeddings=length, rope_parameters=rule)
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=seq_len)


SCALED = {"factor": 4.0, "original_max_position_embeddings": 2048}
RULES = {
    "base": (RoPE(base=5e5), lambda: theirs("default", base=5e5)),
    "interpolated": (Interpolated(factor=4), lambda: theirs("linear", factor=4.0)),
    # Dynamic NTK raises the base by (factor·n / L - factor + 1): by 5 at n = 2L, factor 4, and statically so here.
    "ntk": (NTKAware(factor=5), lambda: theirs("dynamic", factor=4.0, seq_len=2 * 8192)),
    "yarn": (YaRN(factor=4, trained_length=2048), lambda: theirs("yarn", **SCALED)),
    "yarn, fraction": (
        YaRN(factor=4, trained_length=2048, fraction=0.5),
        lambda: theirs("yarn", fraction=0.5, **SCALED),
    ),
    "yarn, options": (
        YaRN(factor=40, trained_length=4096, beta_fast=20, beta_slow=2, attention_factor=1.5, base=5e5),
        lambda: theirs(
            "yarn",
            base=5e5,
            factor=40.0,
            original_max_position_embeddings=4096,
            beta_fast=20.0,
            beta_slow=2.0,
            attention_factor=1.5,
        ),
    ),
    "yarn, short": (
        YaRN(factor=2, trained_length=16),
        lambda: theirs("yarn", factor=2.0, original_max_position_embeddings=16),
    ),
    "llama3": (
        Llama3(factor=8, trained_length=8192),
        lambda: theirs(
            "llama3",
            base=5e5,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "longrope, long": (
        LongRoPE(length=8192, trained_length=2048, short_factor=SHORT, long_factor=LONG),
        lambda: theirs("longrope", seq_len=8192, short_factor=SHORT, long_factor=LONG, **SCALED),
    ),
    "longrope, short": (
        LongRoPE(length=2048, trained_length=2048, short_factor=SHORT, long_factor=LONG),
        lambda: theirs("longrope", seq_len=2048, short_factor=SHORT, long_factor=LONG, **(SCALED | {"factor": 1.0})),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_frequencies_equal_those_of_transformers(name):
    positions, reference = RULES[name]
    frequencies, scale = positions.frequencies(K)
    want, want_scale = reference()
    assert frequencies.dtype == torch.float64 and scale == pytest.approx(want_scale, rel=1e-12)
    torch.testing.assert_close(frequencies, want.double(), rtol=3e-6, atol=0)  # theirs are fp32


def test_a_rotated_head_equals_that_of_transformers():
    q, k = torch.randn(2, 1, 50, 4, K).unbind(0)
    rule = {"rope_type": "yarn", "rope_theta": 1e4, **SCALED}
    config = LlamaConfig(hidden_size=4 * K, num_attention_heads=4, max_position_embeddings=8192, rope_parameters=rule)
    at = torch.arange(50)[None]
    want = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, at), unsqueeze_dim=2)
    rotation = YaRN(factor=4, trained_length=2048).rotation(Whole.of(at), K)
    for x, other in zip((q, k), want, strict=True):
        assert (turn(x, *rotation) - other).norm() <= 1e-5 * other.norm()


def test_truncated_basis_keeps_fast_pairs_and_stops_slow_ones():
    """2308.10882: θ where θ ≥ b, ρ where a < θ < b, 0 where θ ≤ a."""
    frequencies, scale = Truncated(high=0.1, low=1e-3, middle=0.02).frequencies(K)
    for i, got in enumerate(frequencies.tolist()):
        theta = 10_000 ** (-2 * i / K)
        want = theta if theta >= 0.1 else 0.02 if theta > 1e-3 else 0.0
        assert got == pytest.approx(want, rel=1e-14)
    assert scale == 1.0 and {0.0, 0.02} <= set(frequencies.tolist())


def test_yarn_and_llama3_leave_fast_pairs_and_divide_slow_ones():
    trained, _ = RoPE(base=5e5).frequencies(K)
    turns = 8192 * trained / (2 * math.pi)
    for rule, fast in ((YaRN(factor=8, trained_length=8192, base=5e5), 40), (Llama3(trained_length=8192), 4)):
        frequencies, _ = rule.frequencies(K)
        assert torch.equal(frequencies[turns > fast], trained[turns > fast])
        torch.testing.assert_close(frequencies[turns < 0.5], trained[turns < 0.5] / 8, rtol=1e-14, atol=0)
        assert (turns > fast).any() and (turns < 0.5).any()


BATCH = [Sample((40, 1, 23)), Sample((40, 24)), Sample((64,))]


def placed(group, rank, step=7):
    """What one rank of a group would compute on; placing needs no process group."""
    gather = {kind: transports["gather"]() for kind, transports in TRANSPORTS.items()}
    return place(group, BATCH, Comm(group.ranks, rank), device=torch.device("cpu"), step=step, **gather).seq


def whole(sequence, step=7):
    return placed(Group((0,), (sequence,), (((0, 64),),)), 0, step)


def test_randomised_positions_are_ascending_samples_that_change_with_step_sequence_document_and_seed():
    rule = Randomized(longest=200, seed=3)
    first = rule.places(whole(0))
    assert first.shape == (1, 64) and first.min() >= 0 and first.max() < 200
    for document in (first[0, :40], first[0, 41:]):
        assert (document.diff() > 0).all()
    others = [rule.places(whole(0, step=8)), rule.places(whole(1)), Randomized(longest=200, seed=4).places(whole(0))]
    assert all(not torch.equal(first[0, :40], other[0, :40]) for other in others)
    assert torch.equal(first, Randomized(longest=200, seed=3).places(whole(0)))


def test_every_set_of_positions_is_as_likely():
    """Each of 20 positions is in a sample of 5 a quarter of the time, each pair 1 in 19 of it."""
    times = 2000
    drawn = torch.zeros(times, 20)
    for step in range(times):
        seq = Whole.of(torch.arange(5)[None])
        seq.identities = [DocumentKey(step, 0, 0, 5)]
        drawn[step, Randomized(longest=20).places(seq)[0]] = 1
    together = drawn.T @ drawn / times
    assert ((together.diagonal() - 0.25).abs() < 5 * (0.25 * 0.75 / times) ** 0.5).all()
    pairs = together[~torch.eye(20, dtype=torch.bool)]
    assert ((pairs - 0.25 * 4 / 19).abs() < 5 * (0.05 / times) ** 0.5).all()


def test_randomised_positions_are_the_same_at_any_layout():
    rule = Randomized(longest=100)
    want = torch.cat([rule.places(whole(s)) for s in range(3)], 1)[0]
    joined = Group((0, 1), (0, 1, 2), (((0, 30), (162, 192)), ((30, 162),)))
    outer, inner = (rule.places(placed(joined, rank)) for rank in (0, 1))
    assert torch.equal(torch.cat((outer[0], inner[0], outer[1])), want)
    swapped = rule.places(placed(Group((0, 1), (2, 1), (((0, 128),), ())), 0))[0]  # a rank without a span
    assert torch.equal(swapped, torch.cat((want[128:], want[64:128])))
    assert rule.places(placed(Group((0, 1), (2, 1), (((0, 128),), ())), 1)).shape == (1, 1)


def test_nothing_is_random_outside_training_and_a_document_that_is_too_long_is_refused():
    seq = whole(0, step=None)
    assert torch.equal(Randomized(longest=100).places(seq), seq.positions)
    with pytest.raises(ValueError, match="longest=39: must be at least the 40 tokens of a document"):
        Randomized(longest=39).places(whole(0))


@pytest.mark.parametrize(
    "rule, reaches",
    [
        (RoPE(), math.inf),
        (Interpolated(factor=4), 400),
        (NTKAware(factor=2), 200),
        (YaRN(factor=4, trained_length=64), 256),
        (Llama3(factor=8, trained_length=64), 512),
        (LongRoPE(length=640, trained_length=64, short_factor=[1], long_factor=[2]), 640),
        (Truncated(high=0.1, low=0.01, middle=0.02), math.inf),
        (Randomized(longest=300), 300),
    ],
)
def test_how_far_a_rule_reaches_where_100_tokens_were_trained(rule, reaches):
    assert rule.reaches(100) == reaches


def test_no_positions_leave_heads_as_they_are():
    x = torch.randn(1, 5, 2, 8)
    assert torch.equal(turn(x, *NoPE().rotation(Whole.of(torch.arange(5)[None]), 8)), x)


def test_a_fraction_rotates_the_first_channels_only():
    x = torch.randn(1, 9, 2, 16, dtype=torch.float64)
    at = torch.arange(9)[None]
    got = turn(x, *RoPE(fraction=0.25).rotation(Whole.of(at), 16))
    assert torch.equal(got[..., 4:], x[..., 4:])
    torch.testing.assert_close(got[..., :4], rotate(x[..., :4], at, 1e4))


def test_rotation_depends_on_relative_positions_only_and_is_one_at_zero():
    q, k = torch.randn(1, 1, 2, 8, dtype=torch.float64), torch.randn(1, 1, 2, 8, dtype=torch.float64)

    def score(i, j):
        return (rotate(q, torch.tensor([[i]]), 1e4) * rotate(k, torch.tensor([[j]]), 1e4)).sum(-1)

    torch.testing.assert_close(score(7, 3), score(1_000_004, 1_000_000))
    assert torch.equal(rotate(q, torch.zeros(1, 1, dtype=torch.long), 1e4), q)
    pair = rotate(q, torch.tensor([[2]]), 1e4)[0, 0, 0, [1, 5]]  # frequency 1 of 4: 10000^(-2/8)
    angle = torch.tensor(2 * 1e4**-0.25, dtype=torch.float64)
    turned = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    torch.testing.assert_close(pair, turned @ q[0, 0, 0, [1, 5]])


def test_narrow_dtypes_are_rotated_in_fp32_and_wide_ones_not_narrowed():
    at = torch.tensor([[0, 1_000_003]])
    x = torch.randn(1, 2, 1, 8, dtype=torch.float64)
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-6)):
        got = rotate(x.to(dtype), at, 1e4)
        assert got.dtype == dtype and (got - rotate(x, at, 1e4)).norm() <= tolerance * x.norm()
    torch.testing.assert_close(rotate(x, at, 1e4).norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: RoPE(base=1.0), "base=1.0: must be above 1"),
        (lambda: RoPE(fraction=0.0), "fraction=0.0: must be above 0"),
        (lambda: RoPE(fraction=0.1).frequencies(16), "head_dim=16: must have pairs to rotate, fraction=0.1 is 1"),
        (lambda: Interpolated(factor=0.5), "factor=0.5: must be at least 1"),
        (lambda: NTKAware(factor=2).frequencies(2), "head_dim=2: must"),
        (lambda: YaRN(factor=4), "trained_length=None: must be"),
        (lambda: Llama3(), "trained_length=None: must be"),
        (lambda: LongRoPE(length=4, short_factor=[1], long_factor=[1]), "trained_length=None: must be"),
        (lambda: YaRN(factor=4, trained_length=64, beta_fast=1), "beta_fast=1: must be above beta_slow"),
        (lambda: Llama3(trained_length=64, low=5), "high=4.0: must be above low=5"),
        (lambda: LongRoPE(length=4, trained_length=4, short_factor=[], long_factor=[1]), r"short_factor=\[\]: must"),
        (
            lambda: LongRoPE(length=4, trained_length=4, short_factor=[1], long_factor=[1]).frequencies(8),
            "must have 4 numbers, not 1",
        ),
        (lambda: Truncated(high=0.1, low=0.2, middle=0.1), "high=0.1: must be above low=0.2"),
        (lambda: Truncated(high=0.1, low=0.01, middle=0.0), "middle=0.0: must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(build, said):
    with pytest.raises(ValueError, match=said) as error:
        build()
    assert "\n" not in str(error.value)
