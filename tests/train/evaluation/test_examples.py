"""Needles lie where they should, examples ask what their text says, and answers are counted right."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from data.pack import NO_TARGET
from data.tasks import Draw
from data.tokenizer import Bytes
from train.evaluation import examples
from train.evaluation.examples import NeedleExamples
from train.evaluation.score import Score

SYMBOLS = SimpleNamespace(task=SimpleNamespace(symbols=20), tokenizer=SimpleNamespace(DOCUMENT=0))


@pytest.fixture
def texts(monkeypatch):
    """Batches of bytes, whose hay is the letters over and over."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz\n", dtype=np.uint8).astype(np.int64)
    monkeypatch.setattr(examples, "hay", lambda batches, tokens: np.resize(letters, tokens))
    monkeypatch.setattr(examples, "alphabet", lambda batches, symbols: np.sort(letters)[:symbols][: symbols // 2 * 2])
    return SimpleNamespace(tokenizer=Bytes())


def knowing(*known):
    """A scorer that is right about examples of these numbers, for half a nat a target, and wrong about the others."""

    def score(sequences, told):
        told(0, 1)
        found = []
        for n, sequence in enumerate(sequences):
            asked = sequence.targets != NO_TARGET
            found.append(Score(np.where(asked, 0.5 if n in known else 2.0, 0.0), asked & (n in known)))
        return found

    return score


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_a_needle_of_text_lies_at_its_depth_and_is_asked_for_at_the_end(texts, depth):
    needles = NeedleExamples(texts, 512)
    for number, length in enumerate((150, 400, 512)):
        example = needles.example(Draw(0, number), length, depth)
        assert len(example.tokens) == length and example.tokens[0] == Bytes.DOCUMENT and example.starts.sum() == 1
        text = bytes(example.tokens[1:].astype(np.uint8)).decode()
        (key,) = set(re.findall(r"\d+", text))
        told = examples.KEY.format(key)
        assert text.endswith(f"{examples.QUESTION} {key}") and text.count(told) == 1 and len(key) == 5
        room = len(text) - len(told) - len(examples.QUESTION) - 6
        assert text.index(told) == round(depth * room)
        asked = np.flatnonzero(example.targets != NO_TARGET)
        assert bytes(example.targets[asked].astype(np.uint8)).decode() == f" {key}"
        assert np.array_equal(example.tokens[asked + 1], example.targets[asked]) and asked[-1] == length - 2
    with pytest.raises(ValueError, match=r"evaluate.lengths=100: must be at least 1\d\d, for a needle and a question"):
        needles.example(Draw(0, 0), 100, depth)


def test_a_needle_of_symbols_is_a_mark_a_key_and_an_answer():
    example = NeedleExamples(SYMBOLS, 64).example(Draw(0, 3), 40, 0.5)
    tokens = example.tokens.tolist()
    marks = [i for i, token in enumerate(tokens) if token == 0]
    assert marks[0] == 0 and marks[2] == 40 - 6 and len(marks) == 3
    key, *answer = tokens[marks[1] + 1 : marks[1] + 6]
    assert tokens[marks[2] + 1 :] == [key, *answer]
    assert example.targets[example.targets != NO_TARGET].tolist() == answer


def test_cells_average_their_own_examples(texts):
    sizes = {"lengths": [100, 200, 300], "depths": 2, "samples": 2, "tell": lambda done, of: None}
    found = examples.needle(knowing(0, 1, 2, 7), texts, **sizes, all_fit=False)  # type: ignore[arg-type]
    assert found["lengths"] == [200, 300] and found["depths"] == [0.0, 1.0] and found["words"]
    assert found["exact"] == [[1.0, 0.5], [0.0, 0.5]]
    np.testing.assert_allclose(found["logprob"], [[-3.0, -7.5], [-12.0, -7.5]])
    with pytest.raises(ValueError, match="evaluate.lengths=100"):
        examples.needle(knowing(), texts, **sizes, all_fit=True)  # type: ignore[arg-type]


def test_recall_asks_for_the_value_that_stood_behind_the_key(texts):
    seen = []

    def spy(sequences, told):
        seen.extend(sequences)
        return knowing(0)(sequences, told)

    sizes = {"lengths": [16, 64], "symbols": 12, "pairs": 4, "samples": 3, "tell": lambda done, of: None}
    found = examples.recall(spy, texts, **sizes)  # type: ignore[arg-type]
    known = set(examples.alphabet(texts, 12).tolist())
    for example in seen:
        asked = np.flatnonzero(example.targets != NO_TARGET)
        bound = dict(zip(example.tokens[:8:2].tolist(), example.tokens[1:8:2].tolist(), strict=True))
        assert len(asked) == 4 and set(example.tokens.tolist()) <= known
        assert [bound[int(example.tokens[i])] for i in asked] == example.targets[asked].tolist()
    assert [row["length"] for row in found["lengths"]] == [16, 64] and found["chance"] == 1 / 12
    assert [row["accuracy"] for row in found["lengths"]] == [pytest.approx(1 / 3), 0]
    assert found["lengths"][0]["loss"] == pytest.approx((0.5 + 2 + 2) / 3) and found["lengths"][0]["answers"] == 12


def test_copies_are_of_the_vocabulary(texts):
    seen = []

    def spy(sequences, told):
        seen.extend(sequences)
        return knowing()(sequences, told)

    found = examples.copy(spy, texts, lengths=[2, 11, 32], symbols=6, samples=2, tell=lambda done, of: None)  # type: ignore[arg-type]
    assert [row["length"] for row in found["lengths"]] == [10, 32]
    for example in seen:
        half = len(example.tokens) // 2
        assert example.tokens[0] == example.tokens[half] == Bytes.DOCUMENT
        text = example.tokens[1:half]
        assert np.array_equal(text, example.tokens[half + 1 :])
        assert example.targets[example.targets != NO_TARGET].tolist() == text.tolist()
