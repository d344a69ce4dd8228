"""What is read of held-out documents, and how their scores are added up, source by source."""

from types import SimpleNamespace

import numpy as np
import pytest

from data.pack import NO_TARGET
from data.samplers.sampler import Source
from tests.data import fake
from train.evaluation import documents
from train.evaluation.score import Score
from train.evaluation.texts import EvaluationText, alphabet, hay, packed, texts


@pytest.fixture
def batches(tmp_path):
    """Two sources; all documents but the first of each are held out, in the order of their hashes: 1, 3, 2 of `a`."""
    found = []
    for name, lengths in (("a", [300, 90, 40, 1, 200]), ("b", [400, 130])):
        store = fake.Store(tmp_path / name, lengths)
        store.hashes = np.array([1 << 63, 5, 9, 7, 8][: len(lengths)], dtype=np.uint64)
        found.append(Source(name, store))
    sizes = {"packing": "concat", "max_length": 64, "min_length": 8, "overlong": "random", "document_mask": True}
    return fake.of(found, 64, {**sizes, "heldout": 0.01, "heldout_tokens": 64})


def test_documents_are_read_in_the_order_of_their_hashes_until_there_are_enough(batches):
    every = texts(batches, 10_000, 100)
    assert [(text.source, text.length, len(text.packed.tokens)) for text in every] == [
        ("a", 90, 90),
        ("a", 200, 100),
        ("a", 40, 40),
        ("b", 130, 100),
    ]
    assert [(t.source, t.length) for t in texts(batches, 100, 100)] == [("a", 90), ("a", 200), ("b", 130)]
    first = every[0].packed
    assert first.tokens.tolist() == list(range(301, 391))  # ids tell tokens apart
    assert first.targets.tolist() == [*range(302, 391), NO_TARGET]
    assert first.starts.tolist() == [True] + [False] * 89


def test_hay_begins_again_where_it_ends(batches):
    held = 90 + 1 + 200 + 40 + 130
    found = hay(batches, held + 2)
    assert found[:90].tolist() == list(range(301, 391)) and found[held:].tolist() == [301, 302]
    assert len(hay(batches, 95)) == 95
    often = SimpleNamespace(task=SimpleNamespace(symbols=7))
    assert alphabet(often, 32).tolist() == [1, 2, 3, 4, 5, 6] and alphabet(often, 4).tolist() == [1, 2, 3, 4]


def test_hay_is_of_no_generated_document(batches):
    ours = hay(batches, 50)
    batches.sources[0].store.card = {"identity": {"corpus": "needles"}}
    other = hay(batches, 50)
    assert ours[0] == 301 and other[0] == 401 and len(hay(batches, 200)) == 200
    batches.sources[1].store.card = {"identity": {"corpus": "copies"}}
    assert hay(batches, 50).tolist() == ours.tolist(), "where there is nothing else"


def scored(source, length, nats):
    """A document whose targets cost these nats; those below 1 are right."""
    nats = np.array([*nats, 0.0])
    text = EvaluationText(source, length, packed(np.arange(len(nats))))
    return text, Score(nats, (nats < 1) & (text.packed.targets != NO_TARGET))


def test_losses_are_means_over_targets_by_source_and_by_length():
    found = documents.loss(
        [scored("a", 4, [0.5, 1.0, 3.0]), scored("b", 7, [2.0]), scored("b", 8, [0.0, 0.0])], SimpleNamespace()
    )
    assert (found["documents"], found["targets"]) == (3, 6) and "loss_per_byte" not in found
    assert found["loss"] == pytest.approx(6.5 / 6) and found["accuracy"] == pytest.approx(3 / 6)
    assert found["sources"]["a"]["loss"] == pytest.approx(1.5)
    assert found["sources"]["b"] == {"documents": 2, "targets": 3, "loss": 2 / 3, "accuracy": 2 / 3}
    lengths = [(row["from"], row["documents"], row["loss"]) for row in found["lengths"]]
    assert lengths == [(4, 2, pytest.approx(6.5 / 4)), (8, 1, 0.0)]


def test_positions_are_bins_of_what_a_target_has_before_it():
    rows = documents.positions([scored("a", 9, range(8)), scored("a", 3, [10.0, 20.0])])
    assert [(row["from"], row["targets"]) for row in rows] == [(1, 2), (2, 3), (4, 4), (8, 1)]
    assert [row["loss"] for row in rows] == [5.0, pytest.approx(23 / 3), 4.5, 7.0]
    assert rows[0]["accuracy"] == 0.5


def test_the_loss_beyond_the_trained_length_is_held_against_that_within_of_the_same_documents(batches):
    """A scorer whose targets cost 2 nats, or 3 from the 64th on; the second document a nat more everywhere."""
    seen = []

    def scorer(sequences, told):
        seen.extend(sequences)
        costs = [2.0 + (np.arange(len(s.tokens)) >= 64) + (i in (1, 4, 5)) for i, s in enumerate(sequences)]
        return [Score(cost, cost > 0) for cost in costs]

    given = {"trained": 32, "beyond": 4, "most": 2, "tokens": 1000, "tell": lambda done, of: None}
    found = documents.extrapolation(scorer, batches, **given)  # type: ignore[arg-type]
    assert found["whole"] and found["sequences"] == 2 and [len(s.tokens) for s in seen] == [129, 129, 33, 33, 33, 33]
    assert [(row["from"], row["to"]) for row in found["octaves"]] == [(16, 32), (32, 64), (64, 128)]
    assert [row["loss"] for row in found["octaves"]] == [2.5, 2.5, 3.5]
    assert [row["rise"] for row in found["octaves"]] == [0, 0, 1] and found["octaves"][2]["error"] == 0
    assert found["octaves"][2]["ratio"] == pytest.approx(1.4) and "RISES from 64 tokens on" in found["verdict"]
    near, far = (row["matched"] for row in found["octaves"][1:])  # the targets 56 to 63, then 120 to 127
    assert (near["within"], near["loss"], near["rise"], near["targets"]) == (2.5, 2.5, 0, 16)
    assert (far["within"], far["loss"], far["rise"], far["error"]) == (2.5, 3.5, 1, 0)
    for document, windows in ((seen[0], seen[2:4]), (seen[1], seen[4:6])):
        for end, window in zip((64, 128), windows, strict=True):
            assert window.tokens.tolist() == document.tokens[end - 32 : end + 1].tolist()
            assert window.targets[window.targets != NO_TARGET].tolist() == document.tokens[end - 7 : end + 1].tolist()
    seen.clear()
    found = documents.extrapolation(scorer, batches, **{**given, "trained": 48})  # type: ignore[arg-type]
    read = np.concatenate([s.tokens[1:] for s in seen[:2]])
    assert (
        not found["whole"] and read.tolist() == hay(batches, 2 * 192).tolist()
    )  # one has 200: end to end, no token twice
    assert "holds to" not in found["verdict"]
    found = documents.extrapolation(scorer, batches, **{**given, "trained": 256})  # type: ignore[arg-type]
    assert found["octaves"] == [] and found["sequences"] == 0 and found["verdict"] == "not measured"


def test_documents_that_become_harder_are_no_rise(batches):
    """A reader that has use for eight tokens at most, of text whose every token is harder than the one before."""

    def scorer(sequences, told):
        costs = [s.tokens * 0.1 + 8.0 / np.minimum(np.arange(len(s.tokens)) + 1, 8) for s in sequences]
        return [Score(cost, cost > 0) for cost in costs]

    given = {"trained": 32, "beyond": 4, "most": 2, "tokens": 1000, "tell": lambda done, of: None}
    found = documents.extrapolation(scorer, batches, **given)  # type: ignore[arg-type]
    last = found["octaves"][-1]
    assert last["rise"] > 1 and last["rise"] > 2 * last["error"]
    assert last["matched"]["rise"] == last["matched"]["error"] == pytest.approx(0) and last["matched"]["ratio"] == 1
    assert "holds to 128" in found["verdict"]


def test_a_rise_that_is_noise_is_not_called_one():
    matched = {"ratio": 1.5, "rise": 1.0, "error": 0.6}
    rows = [{"from": 16, "to": 32}, {"from": 32, "to": 64, "matched": matched}]
    assert documents._verdict(rows) == "the loss holds to 64 tokens"
    assert "RISES from 32" in documents._verdict([rows[0], rows[1] | {"matched": matched | {"error": 0.4}}])


def test_far_context_is_the_same_targets_with_all_and_with_the_last_tokens_before_them(batches):
    """A scorer whose every target costs a nat for each power of two that it has before it."""
    seen = []

    def scorer(sequences, told):
        seen.extend(sequences)
        costs = [np.where(s.targets != NO_TARGET, np.log2(1 + np.arange(len(s.tokens))), 0.0) for s in sequences]
        return [Score(cost, cost > 0) for cost in costs]

    given = {"length": 150, "context": 16, "most": 2, "tell": lambda done, of: None}
    found = documents.long_range(scorer, batches, **given)  # type: ignore[arg-type]
    assert found["scored"] == 4
    assert [(row["length"], row["documents"]) for row in found["lengths"]] == [(32, 3), (64, 3), (128, 2)]
    for whole, near in zip(seen[::2], seen[1::2], strict=True):
        targets = whole.targets[whole.targets != NO_TARGET]
        assert len(targets) == 4 and np.array_equal(targets, near.targets[near.targets != NO_TARGET])
        assert len(near.tokens) == 17 and np.array_equal(whole.tokens[-17:], near.tokens)
        assert whole.targets[-2] != NO_TARGET and whole.starts.sum() == near.starts.sum() == 1
    for row in found["lengths"]:
        full, near = (np.log2(n + np.arange(-3, 1)).mean() for n in (row["length"], 16))
        assert (row["full"], row["near"]) == (pytest.approx(full), pytest.approx(near))
        assert row["gain"] == pytest.approx(near - full) and row["error"] == pytest.approx(0)
    assert documents.long_range(scorer, batches, **{**given, "context": 128})["lengths"] == []  # type: ignore[arg-type]
