"""What a card counts without holding the corpus, beside what numpy counts of all of it."""

from pathlib import Path

import numpy as np
import pytest

from data.corpora.corpus import Text
from data.stores import card
from data.stores.store import build
from data.tokenizer import Bytes

PICTURES = True


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 5000])
def test_percentiles_are_those_of_all_lengths(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "BLOCK", 64)
    lengths = (np.random.default_rng(count).pareto(1.2, count) * 100).astype(np.int64) + 1
    found, counts = card.lengths_of(np.concatenate([[0], np.cumsum(lengths)]))
    assert np.array_equal(np.repeat(found, counts), np.sort(lengths))
    for p in (0, 1, 10, 33.3, 50, 90, 99, 100):
        assert card.percentile(found, counts, p) == int(np.percentile(lengths, p))


@pytest.mark.parametrize("rounds", [1, 2, 3, 16])
def test_duplicates_are_counted_in_any_number_of_rounds(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, 3000, dtype=np.uint64)
    ends = np.array([0, 0, 2**64 - 1, 2**64 - 1], dtype=np.uint64)
    hashes = draw.permutation(np.concatenate([hashes, hashes[:500], hashes[:100], ends]))
    monkeypatch.setattr(card, "HASHES", -(-len(hashes) // rounds))
    monkeypatch.setattr(card, "BLOCK", 100)
    assert card.duplicates(hashes) == len(hashes) - len(set(hashes.tolist())) == 602


def test_the_histogram_is_in_powers_of_two() -> None:
    lengths = np.array([1, 2, 3, 4, 1023, 1024, 2**40 - 1, 2**40])
    bars = card.histogram(lengths, np.arange(1, 9))
    assert [bar["from"] for bar in bars] == [1, 2, 4, 512, 1024, 2**39, 2**40]
    assert [bar["documents"] for bar in bars] == [1, 5, 4, 5, 6, 7, 8]
    assert sum(bar["tokens"] for bar in bars) == int((lengths * np.arange(1, 9)).sum())


def test_the_picture_of_a_store_is_a_png_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i, length in enumerate((4, 4, 4, 4999)):
        (tmp_path / "texts" / f"{i}.txt").write_text("a" * length)
    store = build(Text(path=str(tmp_path / "texts")), Bytes(), tmp_path / "store")
    card.draw(card.histogram(np.array([5, 5000]), np.array([3, 1])), "4 documents, 5,015 tokens", tmp_path / "x.png")
    picture = (store.folder / "lengths.png").read_bytes()
    assert picture == (tmp_path / "x.png").read_bytes() and picture[:8] == b"\x89PNG\r\n\x1a\n"
