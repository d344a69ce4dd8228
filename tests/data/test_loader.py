from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import Batches, Data
from data.pack import Packed
from data.tokenizer import Bytes
from tests.data import prose, write

CONTENTS = prose(120, 200)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return str(write(tmp_path / "texts", CONTENTS + CONTENTS[:60]))


def opened(texts: str, batch_tokens: int = 256, **changes: Any) -> Batches:
    chosen: dict[str, Any] = {
        "store": f"{texts}-store",
        "max_length": 64,
        "heldout": 0.2,
        "heldout_tokens": 512,
    } | changes
    return Data(corpus="text", path=texts, **chosen).open(batch_tokens)


def sides(batches: Batches) -> list[np.ndarray]:
    """The documents that are trained on, and those that are held out."""
    (source,) = batches.sources
    ((train, _),) = source.documents("train", batches.sequencing.heldout)
    return [np.array(train.ids), np.array(batches.heldout_documents[0].ids)]


def rows(batch: list[Packed]) -> list[tuple[bytes, bytes, bytes]]:
    return [(packed.tokens.tobytes(), packed.targets.tobytes(), packed.starts.tobytes()) for packed in batch]


def test_a_batch_is_a_function_of_seed_and_step(texts: str) -> None:
    one, other = opened(texts), opened(texts)
    steps = range(0, 400, 7)
    forwards = [rows(one.batch(3, step)) for step in steps]
    other.heldout()
    assert [rows(other.batch(3, step)) for step in reversed(steps)] == forwards[::-1]
    assert forwards[0] != rows(one.batch(4, 0))
    assert all(len(batch) == 4 and packed.tokens.shape == (64,) for batch in [one.batch(0, 9)] for packed in batch)


def test_steps_go_through_the_windows_whatever_the_batch(texts: str) -> None:
    small, large = opened(texts, 64), opened(texts, 320)
    assert [row for step in range(250) for row in rows(small.batch(0, step))] == [
        row for step in range(50) for row in rows(large.batch(0, step))
    ]


def test_skipped_batches_move_later_steps_on(texts: str) -> None:
    batches = opened(texts)
    assert rows(batches.batch(0, 10, skips=3)) == rows(batches.batch(0, 13))
    assert rows(batches.batch(0, 10, skips=3)) != rows(batches.batch(0, 10))


def test_no_document_is_on_both_sides(texts: str) -> None:
    batches = opened(texts)
    store, (train, heldout) = batches.sources[0].store, sides(batches)
    texts_of = [{store.document(i).tobytes() for i in documents.tolist()} for documents in (train, heldout)]
    assert not texts_of[0] & texts_of[1]
    assert len(texts_of[0] | texts_of[1]) == len(CONTENTS)
    assert sorted(np.concatenate([train, heldout])) == list(range(len(store)))
    for side, documents in ((False, train), (True, heldout)):
        assert all((int(store.hashes[i]) / 2**64 < 0.2) == side for i in documents)
    assert 0.1 < len(heldout) / len(store) < 0.3


def test_training_meets_only_training_documents(texts: str) -> None:
    batches = opened(texts)
    store = batches.sources[0].store
    meant = {store.document(i).tobytes() for i in sides(batches)[0].tolist()}
    for step in range(20):
        for packed in batches.batch(0, step):
            opens = np.flatnonzero(packed.tokens == Bytes.DOCUMENT)
            for a, b in zip(opens, opens[1:], strict=False):
                assert packed.tokens[a:b].astype(np.uint16).tobytes() in meant


def test_heldout_windows_are_fixed_and_spread(texts: str) -> None:
    batches = opened(texts)
    store = batches.sources[0].store
    stream = [int(token) for i in sides(batches)[1].tolist() for token in store.document(i)]
    batches.batch(0, 1)
    windows = batches.heldout()
    assert len(windows) == 512 // 64
    begins = [i * ((len(stream) - 1) // 64) // 8 * 64 for i in range(8)]
    assert len(set(begins)) == 8
    for begin, packed in zip(begins, windows, strict=True):
        assert packed.tokens.tolist() == stream[begin : begin + 64]
        assert packed.targets.tolist() == stream[begin + 1 : begin + 65]
    assert rows(windows) == rows(opened(texts).heldout())
    assert len(opened(texts, heldout_tokens=1).heldout()) == 1
    assert len(opened(texts, heldout_tokens=10**9).heldout()) == (len(stream) - 1) // 64


def test_the_fingerprint_changes_with_the_batches(texts: str) -> None:
    same = {opened(texts).fingerprint, opened(texts, store=f"{texts}-elsewhere").fingerprint}
    assert len(same) == 1
    different = [opened(texts, max_length=32), opened(texts, heldout=0.3), opened(texts, 512)]
    write(Path(texts), [b"another"])
    different.append(opened(texts))
    assert len(same | {batches.fingerprint for batches in different}) == 5


def test_vocabulary(texts: str) -> None:
    batches = opened(texts)
    assert batches.vocab_size == 257
    assert batches.tokenizer.decode(batches.sources[0].store.document(0)) == CONTENTS[0]


def test_the_default_store_is_in_the_cache_and_reused(
    texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = Data(corpus="text", path=texts)
    store = data.prepare()
    assert store.parent == tmp_path / "cache" / "farspan"
    assert store.name.startswith("text-")
    inode = (store / "tokens.bin").stat().st_ino
    assert data.prepare() == store
    assert (store / "tokens.bin").stat().st_ino == inode
    write(Path(texts), [b"another"])
    assert data.prepare() != store


def test_the_standard_library_from_end_to_end(tmp_path: Path) -> None:
    batches = Data(corpus="stdlib", store=str(tmp_path / "store"), max_length=1024).open(4096)
    assert len(batches.batch(0, 0)) == 4
    assert len(batches.heldout()) == 64
    assert 0.01 < len(sides(batches)[1]) / len(batches.sources[0].store) < 0.06


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"corpus": "stdlob"}, "data.corpus=stdlob: expected one of stdlib, text, jsonl, parquet, hf, megatron, store"),
        ({"corpus": None}, "data.corpus=null: must be one of stdlib, text"),
        ({"corpus": "stdlib", "path": "x"}, "data.path=x: corpus stdlib takes no path"),
        ({"corpus": "text"}, "data.path=null: corpus text needs"),
        ({"corpus": "text", "path": "not/here"}, "data.path=not/here: no such file or folder"),
        ({"corpus": "stdlib", "store": f"{__file__}/store"}, f"data.store={__file__}/store: "),
        ({"corpus": "stdlib", "max_length": 0}, "data.max_length=0: "),
        ({"corpus": "stdlib", "max_length": 4096.0}, "data.max_length=4096.0: "),
        ({"corpus": "stdlib", "max_length": True}, "data.max_length=True: "),
        ({"corpus": "stdlib", "heldout_tokens": -1}, "data.heldout_tokens=-1: "),
        ({"corpus": "stdlib", "heldout": 0}, "data.heldout=0: "),
        ({"corpus": "stdlib", "heldout": 1.0}, "data.heldout=1.0: "),
        ({"corpus": "stdlib", "heldout": "0.1"}, "data.heldout=0.1: "),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:
        Data(**settings).check()
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"batch_tokens": 100}, "train.batch_tokens=100: expected a multiple of data.max_length=64; nearest 128"),
        ({"batch_tokens": 0}, "train.batch_tokens=0: expected a multiple of data.max_length=64; nearest 64"),
        ({"heldout": 1e-9}, "data.heldout=1e-09: leaves no held-out documents of the corpus' 180"),
        ({"heldout": 1 - 1e-9}, "data.heldout=0.999999999: leaves no training documents of the corpus' 180"),
        ({"max_length": 1 << 20, "batch_tokens": 1 << 20}, "data.max_length=1048576: "),
    ],
)
def test_what_does_not_fit_the_corpus_is_refused_in_one_line(texts: str, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:
        opened(texts, **changes)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
