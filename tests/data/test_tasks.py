"""Generated tasks, each held to a solver that reads nothing but the tokens before an answer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from data.pack import NO_TARGET, Packed
from data.tasks import MARK, TASKS, Copy, Draw, Induction, Needle, Task
from data.tokenizer import from_card

SMALL: dict[str, dict[str, Any]] = {
    "copy": {"max_length": 24, "symbols": 5},
    "mqar": {"max_length": 32, "symbols": 20, "pairs": 4},
    "needle": {"max_length": 40, "symbols": 8, "distractors": 2, "answer": 3},
    "induction": {"max_length": 16, "symbols": 6},
}
NAMES = sorted(TASKS)


def task(name: str, **changes: Any) -> Task:
    return TASKS[name](**{**SMALL[name], "heldout_tokens": 4096, **changes})


def rows(batch: list[Packed]) -> list[tuple[bytes, bytes, bytes]]:
    return [(packed.tokens.tobytes(), packed.targets.tobytes(), packed.starts.tobytes()) for packed in batch]


def solve_copy(past: list[int]) -> int:
    half = past.index(MARK, 1)
    return past[len(past) - half]


def solve_mqar(past: list[int]) -> int:
    pairs = dict(zip(past[:8:2], past[1:8:2], strict=True))
    return pairs[past[-1]]


def solve_needle(past: list[int]) -> int:
    asked = max(t for t, token in enumerate(past) if token == MARK)
    marks = [t for t, token in enumerate(past) if token == MARK and past[t + 1] == past[asked + 1]]
    return past[marks[0] + len(past) - asked]


def solve_induction(past: list[int]) -> int:
    return past[past.index(MARK) + 1]


SOLVERS: dict[str, Callable[[list[int]], int]] = {
    "copy": solve_copy,
    "mqar": solve_mqar,
    "needle": solve_needle,
    "induction": solve_induction,
}
ANSWERS = {"copy": 11, "mqar": 4, "needle": 3, "induction": 1}


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_follows_from_the_tokens_before_it(name: str) -> None:
    questions = task(name).open(SMALL[name]["max_length"] * 4)
    for packed in [*questions.batch(1, 0), *questions.batch(1, 5), *questions.heldout()[:20]]:
        assert packed.tokens.dtype == packed.targets.dtype == np.int64
        assert packed.tokens.shape == packed.targets.shape == (SMALL[name]["max_length"],)
        assert packed.starts.tolist() == [True] + [False] * (len(packed.tokens) - 1)
        assert packed.num_targets == ANSWERS[name]
        assert packed.tokens.min() >= 0 and packed.tokens.max() < questions.vocab_size
        for t in np.flatnonzero(packed.targets != NO_TARGET):
            assert packed.targets[t] == SOLVERS[name](packed.tokens[: t + 1].tolist()) != MARK


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_a_function_of_seed_and_step(name: str) -> None:
    length = SMALL[name]["max_length"]
    one, other = task(name).open(4 * length), task(name).open(4 * length)
    steps = range(0, 40, 7)
    forwards = [rows(one.batch(3, step)) for step in steps]
    other.heldout()
    assert [rows(other.batch(3, step)) for step in reversed(steps)] == forwards[::-1]
    assert rows(one.batch(4, 0)) != forwards[0] != forwards[1]
    assert rows(one.batch(3, 5, skips=2)) == rows(one.batch(3, 7)) == forwards[1]
    wide = task(name).open(12 * length)  # the same examples, whatever the batch
    assert rows(wide.batch(3, 1)) == [row for step in (3, 4, 5) for row in rows(one.batch(3, step))]


@pytest.mark.parametrize("name", NAMES)
def test_the_batches_of_a_version_never_change(name: str) -> None:
    """Examples are part of a run's record: whoever changes one of these counts up the task's `version`."""
    packed = task(name).open(SMALL[name]["max_length"]).batch(7, 3)[0]
    expected = {
        "copy": [0, 2, 4, 1, 5, 2, 1, 3, 4, 5, 5, 1, 0, 2, 4, 1, 5, 2, 1, 3, 4, 5, 5, 1],
        "mqar": [
            1,
            14,
            9,
            19,
            4,
            11,
            5,
            18,
            1,
            14,
            8,
            12,
            4,
            7,
            20,
            17,
            8,
            16,
            20,
            15,
            8,
            14,
            5,
            17,
            9,
            17,
            15,
            16,
            14,
            15,
            3,
            2,
        ],
        "needle": [
            0,
            1,
            4,
            4,
            3,
            0,
            4,
            2,
            3,
            6,
            8,
            3,
            5,
            2,
            6,
            5,
            8,
            5,
            3,
            0,
            5,
            8,
            6,
            3,
            7,
            6,
            3,
            6,
            6,
            6,
            1,
            6,
            6,
            8,
            1,
            0,
            4,
            2,
            3,
            6,
        ],
        "induction": [4, 1, 5, 6, 5, 3, 0, 1, 6, 2, 3, 6, 5, 6, 6, 0],
    }
    assert TASKS[name].version == 1 and packed.tokens.tolist() == expected[name]


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_example_is_trained_on(name: str) -> None:
    length = SMALL[name]["max_length"]
    questions = task(name, heldout_tokens=64 * length).open(64 * length)
    heldout = set(rows(questions.heldout()))
    assert len(heldout) == 64 and rows(questions.heldout()) == rows(task(name).open(length).heldout()[:64])
    for seed in (0, 1):  # 0 is also the seed of the held-out side
        assert not heldout & {row for step in range(10) for row in rows(questions.batch(seed, step))}
    assert len(task(name, heldout_tokens=1).open(length).heldout()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_changes_with_every_size(name: str) -> None:
    base = task(name)
    length = base.max_length
    known = {base.open(length).fingerprint, base.open(2 * length).fingerprint}
    more = {key: 2 * value for key, value in SMALL[name].items() if key != "pairs"}
    more |= {"pairs": 3, "gap_power": 0.5} if name == "mqar" else {}
    for key, value in more.items():
        grown = {"max_length": 2 * length} if key in ("distractors", "answer") else {}
        known.add(task(name, **{**grown, key: value}).open(2 * length).fingerprint)
    assert len(known) == 2 + len(more)
    assert base.open(length).fingerprint == task(name).open(length).fingerprint
    card = base.open(length).card()
    assert card["task"] == name and card["max_length"] == length and card["batches"] in known


def test_questions_come_back_soon_by_the_power_law() -> None:
    """The first place after the pairs holds a question more often than the last one, and as often without a power."""

    def first_and_last(power: float) -> tuple[float, float]:
        packed = task("mqar", gap_power=power).open(32 * 600).batch(0, 0)
        asked = np.stack([p.targets != NO_TARGET for p in packed])[:, 8::2].mean(0)
        return float(asked[0]), float(asked[-1])

    first, last = first_and_last(0.01)
    assert first > 0.6 > 0.3 > last
    first, last = first_and_last(1.0)
    assert abs(first - 1 / 3) < 0.07 and abs(last - 1 / 3) < 0.07


def test_a_needle_lies_at_any_depth_and_any_of_the_pairs_is_asked_for() -> None:
    packed = task("needle").open(40 * 600).batch(0, 0)
    places = np.array([np.flatnonzero(p.tokens == MARK) for p in packed])
    assert places.shape == (600, 4) and set(places[:, 3]) == {35}
    assert set(places[:, 0]) >= set(range(15)) and places[:, 2].max() == 30
    assert (np.diff(places, axis=1) >= 5).all()
    asked = [[p.tokens[t + 1] for t in at[:3]].index(p.tokens[36]) for p, at in zip(packed, places, strict=True)]
    assert all(150 < asked.count(which) < 250 for which in range(3))


def test_draws_follow_their_weights() -> None:
    weights = np.array([1.0, 2.0, 3.0, 6.0])
    firsts = [int(Draw(0, n).choose(1, weights)[0]) for n in range(3000)]
    shares = np.bincount(firsts, minlength=4) / 3000
    assert np.abs(shares - weights / 12).max() < 0.03
    assert sorted(Draw(0, 1).distinct(9, 9)) == list(range(9))
    assert set(Draw(1, 1).below(7, 400)) == set(range(7))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Copy(max_length=9), "data.max_length=9: must be even"),
        (lambda: Copy(max_length=2), "data.max_length=2: must be at least 4"),
        (lambda: Copy(symbols=0), "data.symbols=0: must be a whole number from 1"),
        (lambda: Induction(max_length=2), "data.max_length=2: must be at least 3"),
        (lambda: Induction(heldout_tokens=True), "data.heldout_tokens=True: must be a whole number"),
        (lambda: Needle(distractors=-1), "data.distractors=-1: must be a whole number from 0"),
        (lambda: Needle(max_length=8), "data.max_length=8: must be at least 15"),
        (lambda: Needle(symbols=3), "data.distractors=3: must be below data.symbols=3"),
        (lambda: task("mqar", pairs=9), "data.max_length=32: must be at least 36, for data.pairs=9"),
        (lambda: task("mqar", symbols=8), "data.pairs=4: must be below half of data.symbols=8"),
        (lambda: task("mqar", symbols=21), "data.symbols=21: must be even"),
        (lambda: task("mqar", gap_power=0.0), "data.gap_power=0.0: must be above 0"),
        (lambda: task("copy").open(36), "train.batch_tokens=36: must be a multiple of data.max_length=24; nearest 48"),
    ],
)
def test_sizes_that_cannot_be_are_named(make: Callable[[], object], line: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_symbols_spell_no_text() -> None:
    with pytest.raises(ValueError, match="the symbols of a generated task spell no text"):
        from_card(task("copy").open(24).tokenizer.card())
