import hashlib
from pathlib import Path

import numpy as np
import pytest

from data.pack import NO_TARGET, Packed, read, unpacked
from data.stores.store import Store
from data.tokenizer import Bytes
from tests.data import store_of
from tests.data.fake import batches

CONTENTS = [b"one", b"the second", b"3", b"fourth and last"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("pack"), CONTENTS)


def packed(store: Store, pieces: list[list[int]], length: int, **changes: bool) -> Packed:
    return read(store, np.array(pieces), length, document=Bytes.DOCUMENT, **changes)


def test_pieces_and_their_targets_token_by_token(store: Store) -> None:
    found = packed(store, [[8, 15], [0, 4], [15, 17]], 16)
    d, pad = Bytes.DOCUMENT, NO_TARGET
    assert found.tokens.tolist() == [*b" second", d, *b"one", d, *b"3", d, d, d]
    assert found.targets.tolist() == [*b"second", d, *b"one", d, *b"3", d, pad, pad, pad]
    assert np.flatnonzero(found.starts).tolist() == [0, 7, 11, 13]
    assert found.positions.tolist() == [*range(7), *range(4), *range(2), *range(3)]
    assert found.num_targets == 13
    assert found.padding == 3 and found.num_tokens == 13
    assert found.counted.tolist() == [True] * 13 + [False] * 3
    assert found.tokens.dtype == found.targets.dtype == found.positions.dtype == np.int64
    assert found.starts.dtype == np.bool_


def test_a_piece_that_goes_on_elsewhere_is_told_what_follows(store: Store) -> None:
    found = packed(store, [[5, 8]], 3)
    assert found.tokens.tolist() == [*b"the"] and found.targets.tolist() == [*b"he "]


def test_the_last_document_closes_like_any_other(store: Store) -> None:
    end = len(store.tokens)
    assert packed(store, [[end - 4, end]], 4).targets.tolist() == [*b"ast", Bytes.DOCUMENT]


def test_without_the_mask_only_padding_starts_anew(store: Store) -> None:
    found = packed(store, [[8, 15], [0, 4]], 13, masked=False)
    assert np.flatnonzero(found.starts).tolist() == [0, 11]
    assert np.array_equal(found.targets, packed(store, [[8, 15], [0, 4]], 13).targets)


def test_writing_to_a_sequence_leaves_the_store(store: Store) -> None:
    found, before = packed(store, [[0, 4]], 4), store.tokens[:4].tolist()
    found.targets[:2] = NO_TARGET
    assert found.tokens.tolist() == before
    found.tokens[:] = 0
    assert store.tokens[:4].tolist() == before


@pytest.mark.parametrize(
    ("packing", "expected"),
    [("concat", "77e1f7bd3188d5f7"), ("best_fit", "8345aa796f1fc431"), ("decomposition", "9a88a6f87a1552c9")],
)
def test_the_order_never_changes_between_versions(tmp_path: Path, packing: str, expected: str) -> None:
    """A resumed run must meet the batches it would have met: a change here is a new `data.batches.VERSION`."""
    one = batches(tmp_path, [1 + 37 * i % 301 for i in range(60)], 128, packing=packing)
    sequences = [s for seed in (0, 1 << 40) for step in (0, 1, 200) for s in one.batch(seed, step)]
    content = b"".join(array.astype("<i8").tobytes() for s in sequences for array in (s.tokens, s.targets, s.starts))
    assert hashlib.sha256(content).hexdigest()[:16] == expected


def test_unpacked_pieces_are_the_windows_without_padding(store: Store) -> None:
    windows = [packed(store, [[8, 15], [0, 4], [15, 17]], 16), packed(store, [[5, 8], [17, 20]], 6)]
    pieces = unpacked(windows)
    assert [len(p.tokens) for p in pieces] == [7, 4, 2, 3, 3]
    assert [p.origin for p in pieces] == [(0, 0, 0), (0, 1, 7), (0, 2, 11), (1, 0, 0), (1, 1, 3)]
    for name in ("tokens", "targets", "positions"):
        whole = np.concatenate([getattr(w, name)[w.counted] for w in windows])
        assert np.array_equal(np.concatenate([getattr(p, name) for p in pieces]), whole)
    assert all(p.starts.tolist() == [True] + [False] * (len(p.tokens) - 1) and not p.padding for p in pieces)
    bare = packed(store, [[8, 15], [0, 4]], 13, masked=False)
    assert [len(p.tokens) for p in unpacked([bare])] == [11], "tokens that see each other stay together"
