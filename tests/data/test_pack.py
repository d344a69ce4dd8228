import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data.corpus import Text
from data.pack import NO_TARGET, Packed, Windows
from data.store import Store, build
from data.tokenizer import Bytes
from tests.data import prose, store_of, write

LENGTH = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("pack"), prose(40, 300))


class Numbered(Bytes):
    """Gives every token of a corpus its own id, 1, 2, …, so that each can be recognised; DOCUMENT is 0."""

    name = "numbered"
    DOCUMENT = 0

    def __init__(self) -> None:
        self.given = 0

    def encode(self, content: bytes) -> NDArray[np.uint16]:
        ids = np.arange(self.given, self.given + len(content), dtype=np.uint16) + np.uint16(1)
        self.given += len(content)
        return ids


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("numbered")
    return build(Text(path=str(write(folder / "texts", prose(40, 300)))), Numbered(), folder / "store")


def every(store: Store) -> NDArray[np.int64]:
    return np.arange(len(store))


def same(a: Packed, b: Packed) -> bool:
    pairs = ((a.tokens, b.tokens), (a.targets, b.targets), (a.starts, b.starts))
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def assert_follows(packed: Packed, stream: list[int], begin: int, length: int) -> None:
    """`packed` is stream[begin:begin + length], told token by token."""
    position = -1
    for i in range(length):
        opens = i == 0 or stream[begin + i] == Bytes.DOCUMENT
        position = 0 if opens else position + 1
        assert packed.tokens[i] == stream[begin + i]
        assert packed.targets[i] == stream[begin + i + 1]
        assert packed.starts[i] == opens
        assert packed.positions[i] == position
    assert packed.tokens.shape == packed.targets.shape == packed.starts.shape == packed.positions.shape == (length,)
    assert packed.tokens.dtype == packed.targets.dtype == packed.positions.dtype == np.int64
    assert packed.starts.dtype == np.bool_
    assert packed.num_targets == length


@pytest.mark.parametrize("length", [1, 7, LENGTH, 1000])
def test_natural_windows_follow_the_documents(store: Store, length: int) -> None:
    documents = np.array([3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 39, 0])
    stream = [int(token) for d in documents for token in store.document(d)]
    windows = Windows(store, documents, length)
    assert len(windows) == (len(stream) - 1) // length
    for i in range(len(windows)):
        assert_follows(windows.natural(i), stream, i * length, length)


def test_the_last_window_may_end_with_the_stream(store: Store) -> None:
    total = len(store.tokens)
    assert len(Windows(store, every(store), total - 1)) == 1
    with pytest.raises(ValueError, match=rf"^data\.max_length={total}: .* at most {total - 1} fits"):
        Windows(store, every(store), total)


def test_epochs_are_whole_documents_in_some_order(store: Store) -> None:
    total = len(store.tokens)
    packed = Windows(store, every(store), total - 1).window(seed=5, index=3)
    stream = [*packed.tokens.tolist(), int(packed.targets[-1])]
    assert_follows(packed, stream, 0, total - 1)
    opens = [i for i, token in enumerate(stream) if token == Bytes.DOCUMENT]
    documents = [tuple(stream[a:b]) for a, b in zip(opens, [*opens[1:], total], strict=True)]
    natural = [tuple(store.document(i).tolist()) for i in range(len(store))]
    assert sorted(documents) == sorted(natural)
    assert documents != natural


def test_an_epoch_visits_every_token_once(numbered: Store) -> None:
    windows = Windows(numbered, every(numbered), LENGTH)
    total = len(numbered.tokens)
    for epoch in range(3):
        epoch_windows = [windows.window(1, epoch * len(windows) + i) for i in range(len(windows))]
        for row in ("tokens", "targets"):
            ids = np.concatenate([getattr(packed, row) for packed in epoch_windows])
            contents = ids[ids != Numbered.DOCUMENT]
            assert len(np.unique(contents)) == len(contents)
            assert np.count_nonzero(ids == Numbered.DOCUMENT) <= len(numbered)
            assert total - LENGTH <= len(ids) + 1 <= total


def test_epochs_and_seeds_cut_different_windows_and_visit_them_out_of_order(numbered: Store) -> None:
    windows = Windows(numbered, every(numbered), LENGTH)
    count = len(windows)
    epochs = {
        (seed, epoch): [windows.window(seed, epoch * count + i) for i in range(count)]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    contents = {key: {packed.tokens.tobytes() for packed in epoch} for key, epoch in epochs.items()}
    for a in contents:
        for b in contents:
            assert a == b or len(contents[a] & contents[b]) < count / 2
    for epoch in epochs.values():
        runs = sum(a.targets[-1] == b.tokens[0] != 0 for a, b in zip(epoch, epoch[1:], strict=False))
        assert runs < count / 10


def test_a_window_is_a_function_of_seed_and_index(store: Store) -> None:
    documents = np.arange(0, len(store), 2)
    windows = Windows(store, documents, LENGTH)
    keys = [(seed, index) for seed in (0, 7) for index in range(0, 4 * len(windows), 5)]
    forwards = {key: windows.window(*key) for key in keys}
    other = Windows(Store(store.folder), documents.copy(), LENGTH)
    other.natural(2)
    for key in reversed(keys):
        assert same(forwards[key], other.window(*key))
        assert same(forwards[key], windows.window(*key))


def test_only_the_epochs_in_use_are_kept(store: Store) -> None:
    windows = Windows(store, every(store), LENGTH)
    for index in range(5 * len(windows)):
        windows.window(0, index)
    assert sorted(windows._epochs) == [(0, 3), (0, 4)]


def test_the_order_never_changes_between_versions(tmp_path: Path) -> None:
    """A resumed run must meet the batches it would have met: a change here is a new `Windows.version`."""
    store = store_of(tmp_path, [bytes([97 + i]) * (1 + 37 * i % 101) for i in range(26)])
    windows = Windows(store, every(store), LENGTH)
    content = b"".join(windows.window(seed, index).tokens.tobytes() for seed in (0, 1 << 40) for index in (0, 1, 200))
    assert Windows.version == 1
    assert hashlib.sha256(content).hexdigest() == "2cce8a1a099ad6233b737792ee5066376fa25185ff5a5c6f7b145e116b1cec50"


def test_writing_to_the_targets_leaves_the_tokens_and_the_store(store: Store) -> None:
    windows = Windows(store, every(store), LENGTH)
    packed, before = windows.window(0, 0), windows.window(0, 0)
    packed.targets[:10] = NO_TARGET
    assert np.array_equal(packed.tokens, before.tokens)
    assert packed.num_targets == LENGTH - 10
    packed.tokens[:] = 0
    assert same(windows.window(0, 0), before)


def test_too_few_tokens_for_one_window(tmp_path: Path) -> None:
    store = store_of(tmp_path, [b"ab", b"c"])
    with pytest.raises(ValueError, match=r"^data\.max_length=9: 2 documents, 5 tokens together"):
        Windows(store, every(store), 9)
