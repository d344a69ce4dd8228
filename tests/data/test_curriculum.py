from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.batches import changed
from data.curriculum import ODDS, Buckets, Curriculum
from parallel.schedule import SCHEDULERS
from tests.data.fake import batches

LENGTHS = [1 + 37 * i % 301 for i in range(60)]


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any),
    st.sampled_from(ODDS),
    st.integers(1, 40),
    st.none() | st.integers(0, 60),
)
def test_a_step_reached_directly_is_the_one_of_the_row(
    weights: list[int], odds: str, cycle: int, cap: int | None
) -> None:
    caps = None if cap is None else [cap, *[None] * (len(weights) - 1)]
    found = Buckets([(0, weights)], odds=Curriculum(odds=odds).odds_of(len(weights)), cycle=cycle, caps=caps)
    counts = [0] * len(weights)
    for step in range(130 if found.total is None else min(found.total, 130)):
        assert found.before(step) == tuple(counts)
        bucket, before = found.at(step)
        assert before == counts[bucket] and weights[bucket]
        counts[bucket] += 1


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.sampled_from(ODDS), st.integers(1, 60))
def test_a_cycle_gives_each_bucket_what_its_tokens_are_worth(weights: list[int], odds: str, cycle: int) -> None:
    found = Buckets([(0, weights)], odds=Curriculum(odds=odds).odds_of(len(weights)), cycle=cycle)
    for n in range(4):
        for given_, weight in zip(found.before(n * cycle), weights, strict=True):
            assert abs(given_ - n * cycle * weight / sum(weights)) <= len(weights) / 2


@cache
def order(odds: str) -> list[int]:
    found = Buckets([(0, [100] * 6)], odds=Curriculum(odds=odds).odds_of(6), cycle=600)
    return [found.at(step)[0] for step in range(600)]


def test_odds_are_those_of_the_paper() -> None:
    assert Curriculum(odds="grow_linear").odds_of(6) == [6, 5, 4, 3, 2, 1]
    assert Curriculum(odds="grow_p2").odds_of(6) == [32, 16, 8, 4, 2, 1]
    assert Curriculum(odds="grow_p100").odds_of(3) == [10_000, 100, 1]
    assert Curriculum(odds="shrink_p100").odds_of(3) == [1, 100, 10_000]
    assert Curriculum().odds_of(3) == [1, 1, 1]
    first = order("grow_p2")[:63]
    assert [first.count(k) for k in range(6)] == [32, 16, 8, 4, 2, 1]


def test_growing_curricula_grow_and_a_bucket_that_is_dry_leaves() -> None:
    means = {odds: [sum(order(odds)[a : a + 100]) / 100 for a in range(0, 600, 100)] for odds in ODDS}
    assert max(means["uniform"]) - min(means["uniform"]) < 0.1
    for odds in ("grow_linear", "grow_p2", "grow_p100"):
        assert means[odds] == sorted(means[odds])
    assert means["shrink_p100"] == sorted(means["shrink_p100"], reverse=True)
    assert means["grow_linear"][0] > means["grow_p2"][0] > means["grow_p100"][0]
    for odds in ODDS:
        found = order(odds)
        assert [found.count(k) for k in range(6)] == [100] * 6
    dry = [len(order("grow_p2")) - order("grow_p2")[::-1].index(k) for k in range(6)]
    assert dry == sorted(dry) and dry[0] < 250


def test_lengths_grow_where_the_context_says_so(tmp_path: Path) -> None:
    curriculum = Curriculum(context=[[0, 16, None], [1000, 32, 20_000], [2560, 64, 5e4]])
    one = batches(tmp_path, LENGTHS, 128, curriculum=curriculum)
    lengths = [len(one.batch(0, step)[0].tokens) for step in range(30)]
    assert lengths == [16] * 8 + [32] * 12 + [64] * 10
    assert [one.rope_theta(step) for step in (0, 7, 8, 19, 20, 10**6)] == [None, None, 2e4, 2e4, 5e4, 5e4]
    assert one.shapes() == [[16] * 8, [32] * 4, [64] * 2]
    assert one.drawn(30) == {"16": 1024, "32": 1536, "64": 1280}
    assert one.drawn(8, skips=4) == {"16": 1024, "32": 512}
    assert one.heldout()[0].tokens.shape == (64,)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("packing", ["concat", "decomposition"])
def test_the_batch_is_the_same_at_any_number_of_data_ranks(tmp_path: Path, packing: str, ranks: int) -> None:
    """A plan deals out the batch; every kind of batch can be dealt out, over sequence-parallel ranks as well."""
    one = batches(tmp_path, LENGTHS, 256, packing=packing)
    scheduler = SCHEDULERS["static"]()
    for step in range(6):
        lengths = [len(s.tokens) for s in one.batch(0, step)]
        for sequence in (1, 2, 4):
            scheduler.plan(step, lengths, data=ranks, sequence=sequence).check(ranks * sequence)
    for lengths in one.shapes():
        scheduler.plan(0, lengths, data=ranks, sequence=1).check(ranks)


def test_an_order_that_changed_is_told_by_its_keys(tmp_path: Path) -> None:
    base = {"packing": "decomposition"}
    one = batches(tmp_path, LENGTHS, 128, **base)
    again = batches(tmp_path / "elsewhere", LENGTHS, 128, **base)
    assert one.fingerprint == again.fingerprint and changed(one.order, again.order) == ""
    grown = Curriculum(odds="grow_p2", tokens=1000)
    others: dict[str, Any] = {
        "data.packing was decomposition, is concat": batches(tmp_path, LENGTHS, 128),
        "data.max_length was 64, is 32": batches(tmp_path, LENGTHS, 128, **base, max_length=32),
        "data.min_length was 8, is 16": batches(tmp_path, LENGTHS, 128, **base, min_length=16),
        "data.overlong was random, is longest": batches(tmp_path, LENGTHS, 128, **base, overlong="longest"),
        "train.batch_tokens was 128, is 256": batches(tmp_path, LENGTHS, 256, **base),
        "data.corpus: other documents": batches(tmp_path, LENGTHS[1:], 128, **base),
        "curriculum.odds was None, is grow_p2": batches(tmp_path, LENGTHS, 128, **base, curriculum=grown),
    }
    assert len({one.fingerprint, *(other.fingerprint for other in others.values())}) == 1 + len(others)
    for line, other in others.items():
        assert line in changed(one.order, other.order)
    assert "another version" in changed(None, one.order)
    assert changed({**one.order, "version": 0}, one.order) == "this version of farspan has another"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"odds": "grow"}, "curriculum.odds=grow: must be one of uniform, "),
        ({"cycles": 0}, "curriculum.cycles=0: must be at least 1"),
        ({"tokens": 0}, "curriculum.tokens=0: must be at least 1, or null"),
        ({"context": []}, "curriculum.context=[]: must begin with token 0"),
        ({"context": [[5, 64, None]]}, "curriculum.context=[[5, 64, None]]: must begin with token 0"),
        ({"context": [[0, 64, None], [0, 32, None]]}, "curriculum.context=[[0, 64, None], [0, 32, None]]: must begin"),
        ({"context": [[0, 64]]}, "curriculum.context=[0, 64]: must be lines of [token, max_length, rope_theta]"),
        ({"context": [[0, 0, None]]}, "curriculum.context=[0, 0, None]: must have whole numbers"),
        ({"context": [[0, 64, 0.5]]}, "curriculum.context=[0, 64, 0.5]: rope_theta must be above 1"),
    ],
)
def test_bad_curricula_are_refused_in_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:
        Curriculum(**settings)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    ("changes", "curriculum", "line"),
    [
        ({}, {"odds": "grow_p2"}, "data.packing=concat: must be decomposition for curriculum.odds=grow_p2"),
        ({"packing": "x"}, {}, "data.packing=x: must be one of concat, best_fit, decomposition"),
        ({"packing": "decomposition", "max_length": 96}, {}, "data.max_length=96: must be a power of two"),
        (
            {"packing": "decomposition", "min_length": 128},
            {},
            "data.min_length=128: must be at most data.max_length=64",
        ),
        ({"overlong": "x"}, {}, "data.overlong=x: must be one of random, longest"),
        ({}, {"context": [[0, 128, None]]}, "data.max_length=64: must be at least 128"),
        ({}, {"context": [[0, 48, None]]}, "train.batch_tokens=128: expected a multiple of data.max_length=48"),
        (
            {"packing": "decomposition", "min_length": 32},
            {"context": [[0, 16, None]]},
            "curriculum.context: 16 must be a power of two from data.min_length=32",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], curriculum: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError) as error:
        batches(tmp_path, LENGTHS, 128, curriculum=Curriculum(**curriculum), **changes)
    assert str(error.value).startswith(line)
