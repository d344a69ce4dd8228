"""One text, or a few, are trained on and held out: a part of the longest is, and nothing crosses between the two."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.batches import Batches
from data.loader import Data
from data.pack import NO_TARGET
from data.samplers.divided import FEW
from data.stores import card
from tests.data import prose, write


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "draw", lambda *_: None)


def opened(folder: Path, contents: list[bytes], **changes: Any) -> Batches:
    path = write(folder / "texts", contents)
    chosen: dict[str, Any] = {"max_length": 64, "heldout": 0.1, "heldout_tokens": 256, "min_length": 8} | changes
    return Data(corpus="text", path=str(path), store=str(folder / "store"), **chosen).open(256)


def read_by_training(batches: Batches, steps: int) -> set[int]:
    """The places in the store that some steps read."""
    return {
        place
        for step in range(steps)
        for slot in batches.slots(step)
        for begin, end in slot.pieces(0).tolist()
        for place in range(begin, end)
    }


TEXT = bytes(range(65, 65 + 26)) * 100


@pytest.mark.parametrize("packing", ["concat", "best_fit", "decomposition"])
def test_one_text_trains_on_its_begin_and_holds_out_its_end(tmp_path: Path, packing: str) -> None:
    batches = opened(tmp_path, [TEXT], packing=packing)
    end = len(TEXT) + 1  # and the token that opens it
    train = end - 261  # a tenth, rounded up, is held out
    assert read_by_training(batches, 30) <= set(range(train))
    held = np.concatenate([window.tokens for window in batches.heldout()])
    assert held.tolist() == list(TEXT[train - 1 : train - 1 + 256])
    line, *more = batches.report()
    assert len(more) == (packing == "best_fit"), "which says that it cuts the document"
    assert line == (
        "data.path: too few documents to hold out whole ones by data.heldout=0.1: of the document the first 2,340 "
        "tokens are trained on, and those behind them are held out"
    )


def test_the_first_token_that_is_held_out_is_no_target(tmp_path: Path) -> None:
    batches = opened(tmp_path, [TEXT], packing="best_fit")
    seen = 0
    for step in range(20):
        for slot, packed in zip(batches.slots(step), batches.batch(0, step), strict=True):
            ends = slot.pieces(0)[:, 1] - slot.pieces(0)[:, 0]
            if 2340 in slot.pieces(0)[:, 1]:
                last = int(np.cumsum(ends)[slot.pieces(0)[:, 1].tolist().index(2340)]) - 1
                assert packed.targets[last] == NO_TARGET
                seen += 1
    assert seen


def test_the_place_depends_on_the_store_and_the_fraction_alone(tmp_path: Path) -> None:
    cuts = {opened(tmp_path, [TEXT], max_length=length).sources[0].store.cut for length in (16, 64, 128)}
    assert cuts == {(0, 2340)}
    assert opened(tmp_path, [TEXT], heldout=0.2).sources[0].store.cut == (0, 2601 - 521)


def test_copies_are_cut_at_the_same_place(tmp_path: Path) -> None:
    batches = opened(tmp_path, [TEXT, b"short", TEXT])
    store = batches.sources[0].store
    held = [store.document(i).tolist() for i in batches.heldout_documents[0].ids.tolist()]
    assert len(held) == 2 and held[0] == held[1] == list(TEXT)[-len(held[0]) :]
    trained = [store.document(i).tolist() for i in batches.sources[0].documents("train", 0.1)[0][0].ids.tolist()]
    assert sorted(map(len, trained)) == [6, 2601 - len(held[0]), 2601 - len(held[0])]


def test_a_document_that_is_held_out_whole_is_divided_where_it_is_the_only_one(tmp_path: Path) -> None:
    batches = opened(tmp_path, [TEXT], heldout=0.9)
    assert read_by_training(batches, 4) <= set(range(batches.sources[0].store.cut[1]))
    assert len(batches.heldout_documents[0]) > 2000


@pytest.mark.parametrize("seed", range(4))
def test_a_few_texts_train_whatever_their_hashes_are(tmp_path: Path, seed: int) -> None:
    contents = [content * 40 for content in prose(5, 60, seed)]
    batches = opened(tmp_path, contents)
    trained, held = read_by_training(batches, 40), batches.heldout_documents[0]
    spans = held.pieces(0, len(held)).tolist()
    assert trained and len(held) > 1 and batches.heldout()
    assert not trained & {place for begin, end in spans for place in range(begin, end)}


def test_what_is_held_out_may_be_less_than_a_window(tmp_path: Path) -> None:
    batches = opened(tmp_path, [TEXT[:700]], heldout=0.03)
    (window,) = batches.heldout()
    assert window.tokens[:22].tolist() == list(TEXT[678:700])
    assert window.num_targets == 22
    assert "22 tokens are held out, less than a sequence of data.max_length=64" in batches.report()[1]


def test_many_documents_are_split_as_ever(tmp_path: Path) -> None:
    store = opened(tmp_path, prose(FEW, 50)).sources[0].store
    assert not hasattr(store, "cut")
    few = opened(tmp_path / "few", prose(20, 500, 3), heldout=0.3)
    assert not hasattr(few.sources[0].store, "cut") and few.report() == []


def test_a_divided_store_is_found_again_after_pickling(tmp_path: Path) -> None:
    store = opened(tmp_path, [TEXT]).sources[0].store
    again = pickle.loads(pickle.dumps(store))
    assert again.cut == store.cut and np.array_equal(again.offsets, store.offsets)
    assert again.fingerprint == store.fingerprint
