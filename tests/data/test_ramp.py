"""Batches that grow: their sizes in closed form, the same sequences in the same order, and what cannot have them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.audit import audit
from data.batch_ramp import Ramp, Ramped, opened
from data.curriculum import Curriculum
from data.tasks import Copy
from tests.data.fake import batches

LENGTHS = [1 + 37 * i % 301 for i in range(60)]
LINES = [[0, 128], [512, 256], [1500, 384]]


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    gaps=st.lists(st.integers(1, 300), min_size=5, max_size=5),
    tokens=st.integers(1, 3000),
)
def test_sizes_are_those_of_a_walk_from_the_start(sizes, gaps, tokens):
    begins = [0, *(sum(gaps[: i + 1]) for i in range(len(sizes) - 1))]
    ramp, at, step = Ramp.of([list(line) for line in zip(begins, sizes, strict=True)]), 0, 0
    while at < tokens:
        size = next(size for begin, size in zip(begins[::-1], sizes[::-1], strict=True) if begin <= at)
        assert (ramp.size(step), ramp.before(step)) == (size, at)
        at, step = at + size, step + 1
    assert ramp.steps(tokens) == step and at % ramp.unit == 0
    assert {ramp.size(i) for i in range(step)} <= set(ramp.sizes)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_ramp_reads_the_same_sequences_in_the_same_order(tmp_path: Path, packing: str) -> None:
    units = batches(tmp_path, LENGTHS, 128, packing=packing)
    ramped = Ramped(units, Ramp.of(LINES))
    flat = [s.tokens.tolist() for step in range(60) for s in units.batch(3, step)]
    found = [[s.tokens.tolist() for s in ramped.batch(3, step)] for step in range(20)]
    assert [len(batch) for batch in found] == [2] * 4 + [4] * 4 + [6] * 12
    assert [row for batch in found for row in batch] == flat[: sum(map(len, found))]
    assert [s.tokens.tolist() for s in ramped.batch(3, 9, skips=2)] == found[11]
    assert sum(ramped.drawn(9, skips=2).values()) == 128 * 4 + 256 * 4 + 384 * 3 == Ramp.of(LINES).before(11)
    assert ramped.shapes() == [[64] * 2, [64] * 4, [64] * 6]
    assert ramped.fingerprint != units.fingerprint and ramped.order["train.batch_tokens"] == LINES
    assert (
        audit(ramped, 3, 30, first=2)[0] == "30 steps of 128 to 384 tokens: no token lost, none seen twice in an epoch"
    )


def test_a_task_takes_a_ramp_too() -> None:
    task = Copy(max_length=16, symbols=8, heldout_tokens=64)
    ramped, units = opened(task, [[0, 32], [64, 64]], None), opened(task, 32, None)
    assert not isinstance(units, Ramped)
    want = [s.tokens.tolist() for step in (2, 3) for s in units.batch(0, step)]
    assert [s.tokens.tolist() for s in ramped.batch(0, 2)] == want


def test_lengths_that_change_refuse_a_ramp(tmp_path: Path) -> None:
    for changes in (
        {"packing": "decomposition"},
        {"curriculum": Curriculum(context=[[0, 32, None], [1024, 64, None]])},
    ):
        with pytest.raises(
            ValueError, match=r"^train.batch_tokens=\[\[0, 128\].* must be one number where the lengths"
        ):
            Ramped(batches(tmp_path, LENGTHS, 128, **changes), Ramp.of(LINES))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0, -4, True, [], [[5, 128]], [[0, 128], [0, 256]], [[0, 0]], [[0, 1.5]], [[0]], "x"])
def test_what_is_no_ramp_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="^train.batch_tokens="):
        Ramp.of(wrong)


def test_sizes_must_hold_whole_sequences() -> None:
    with pytest.raises(
        ValueError, match=r"^train.batch_tokens=\[\[0, 32\], \[64, 40\]\]: what its sizes have in common, 8"
    ):
        opened(Copy(max_length=16, symbols=8, heldout_tokens=64), [[0, 32], [64, 40]], None)
