from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.curriculum import ODDS, Curriculum
from data.pack import NO_TARGET
from data.samplers import PACKINGS
from data.samplers.best_fit import Bins, best_fit, split
from data.samplers.documents import Documents
from data.samplers.index import SamplerIndex
from data.samplers.pool import Cut
from tests.data.fake import Store, batches

FLEXSP = Path(__file__).parents[4] / "shared" / "data" / "wikipedia_document_lengths.npy"
LENGTHS = st.lists(st.integers(1, 400), min_size=5, max_size=40).filter(lambda lengths: sum(lengths) > 300)
on_disk = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def indices(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def documents(folder: Path, lengths: list[int]) -> Documents:
    return Documents(Store(folder, [*lengths, 1]), side="train", heldout=0.01)


@on_disk
@given(lengths=LENGTHS, name=st.sampled_from(sorted(PACKINGS)), seed=st.integers(0, 2**40))
def test_an_epoch_has_every_token_of_every_kept_document_once(
    tmp_path: Path, lengths: list[int], name: str, seed: int
) -> None:
    row = documents(tmp_path, lengths)
    everything = np.arange(sum(lengths))
    for pool in PACKINGS[name](row, Cut(64, 8)):
        for epoch in (0, 3):
            first = epoch * pool.count
            found = [pool.pieces((seed,), i) for i in range(first, first + pool.count)]
            for pieces in found:
                sizes = pieces[:, 1] - pieces[:, 0]
                assert (sizes > 0).all()
                assert sizes.sum() <= pool.length if name == "best_fit" else sizes.sum() == pool.length
            read = np.concatenate([np.arange(a, b) for pieces in found for a, b in pieces])
            assert len(read) == len(set(read.tolist())) == pool.tokens
            if name == "best_fit":
                assert np.array_equal(np.sort(read), everything)
            if name == "concat":
                assert sum(lengths) - len(read) < 64


@on_disk
@given(lengths=LENGTHS)
def test_buckets_hold_all_but_remainders(tmp_path: Path, lengths: list[int]) -> None:
    pools = PACKINGS["decomposition"](documents(tmp_path, lengths), Cut(64, 8))
    read = [p for pool in pools for i in range(pool.count) for a, b in pool.pieces((0,), i) for p in range(a, b)]
    assert len(read) == len(set(read)) == sum(length // 8 * 8 for length in lengths)


@on_disk
@given(
    lengths=LENGTHS,
    packing=st.sampled_from(sorted(PACKINGS)),
    odds=st.sampled_from(ODDS),
    seed=st.integers(0, 9),
    step=st.integers(0, 10**9),
)
def test_a_step_is_reached_directly_and_has_its_tokens(
    tmp_path: Path, lengths: list[int], packing: str, odds: str, seed: int, step: int
) -> None:
    curriculum = Curriculum(odds=odds if packing == "decomposition" else "uniform", cycles=2, tokens=2560)
    one = batches(tmp_path, lengths, 128, packing=packing, curriculum=curriculum)
    for at in (step, 7):
        batch = one.batch(seed, at)
        assert sum(len(s.tokens) for s in batch) == 128 and len({len(s.tokens) for s in batch}) == 1
        assert [len(s.tokens) for s in batch] in one.shapes()
        again = batches(tmp_path, lengths, 128, packing=packing, curriculum=curriculum).batch(seed, at - 3, skips=3)
        assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(batch, again, strict=True))


@on_disk
@given(lengths=LENGTHS, packing=st.sampled_from(sorted(PACKINGS)), odds=st.sampled_from(ODDS))
def test_the_stream_counts_through_every_pool_and_adds_up(
    tmp_path: Path, lengths: list[int], packing: str, odds: str
) -> None:
    curriculum = Curriculum(odds=odds if packing == "decomposition" else "uniform", cycles=3, tokens=128 * 20)
    one = batches(tmp_path, lengths, 128, packing=packing, curriculum=curriculum)
    seen: dict[str, int] = {}
    for step in range(60):
        drawn = one.drawn(step)
        assert sum(drawn.values()) == step * 128
        for slot in one.slots(step):
            name, length = slot.part.name, slot.part.pool.length
            assert slot.index * length == seen.get(name, 0)
            seen[name] = seen.get(name, 0) + length
        assert {name: tokens for name, tokens in one.drawn(step + 1).items() if tokens} == seen


def test_targets_are_the_next_tokens_of_the_document(tmp_path: Path) -> None:
    lengths = [5, 70, 3, 200, 64, 128, 9, 33]
    ends = set(np.cumsum(lengths).tolist())  # ids are places + 1: what a document ends with is one of these
    for packing in PACKINGS:
        one = batches(tmp_path, lengths, 128, packing=packing)
        for step in range(8):
            for s in one.batch(1, step):
                for token, target in zip(s.tokens.tolist(), s.targets.tolist(), strict=True):
                    assert target == (NO_TARGET if token in ends or token == 0 else token + 1)
                begins = np.flatnonzero(s.starts)
                for a, b in zip(begins, [*begins[1:], len(s.tokens)], strict=True):
                    padding = s.tokens[a] == 0
                    assert (np.diff(s.tokens[a:b]) == (0 if padding else 1)).all()


def test_without_the_mask_a_sequence_is_one_piece(tmp_path: Path) -> None:
    lengths = [5, 70, 3, 20, 64, 28, 9, 33]
    masked, bare = (batches(tmp_path, lengths, 128, document_mask=mask) for mask in (True, False))
    some = [(a, b) for step in range(3) for a, b in zip(masked.batch(0, step), bare.batch(0, step), strict=True)]
    for a, b in some:
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.targets, b.targets)
        assert np.flatnonzero(b.starts).tolist() == [0]
    assert any(a.starts.sum() > 1 for a, _ in some)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_best_fit_is_best_fit(lengths: list[int]) -> None:
    """Against the rule said slowly: longest first, into the open bin with the least room that is enough."""
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= size]
        if fits:
            rooms.remove(min(fits))
            rooms.append(min(fits) - size)
        else:
            rooms.append(50 - size)
    bins = best_fit(np.array(lengths), 50)
    assert sorted(50 - np.bincount(bins, lengths)) == sorted(rooms)


@pytest.mark.skipif(not FLEXSP.exists(), reason="the file of document lengths is not here")
def test_the_packing_table() -> None:
    """Of docs/data.md, cut to 8,192: in one window, as few sequences as there can be; only what is longer is cut."""
    lengths = np.load(FLEXSP).astype(np.int64)
    ends = np.cumsum(lengths)
    begins, pieces = split(ends - lengths, lengths, 8192)
    assert len(pieces) - len(lengths) == int(((lengths - 1) // 8192).sum())
    bins = best_fit(pieces, 8192)
    assert int(bins.max()) + 1 == 49_490 == -(-int(ends[-1]) // 8192)
    assert np.bincount(bins, pieces).max() == 8192
    windows = [
        best_fit(split(ends[a:b], lengths[a:b], 8192)[1], 8192)
        for a, b in pairwise([*range(0, 400_000, 1 << 16), 400_000])
    ]
    assert sum(int(found.max()) + 1 for found in windows) == 49_495
    assert round(100 * (lengths > 8192).mean(), 1) == 1.6
    assert round(100 * ((ends - lengths) // 8192 != (ends - 1) // 8192).mean(), 1) == 10.5


def test_bins_of_windows_hold_whole_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.samplers.documents.BLOCK", 16)
    lengths = [1 + 37 * i % 101 for i in range(100)]
    row = documents(tmp_path, lengths)
    (pool,) = PACKINGS["best_fit"](row, Cut(128))
    assert isinstance(pool, Bins)
    ends = np.cumsum(lengths)
    places = {int(ends[i] - lengths[i]): n // 16 for n, i in enumerate(row.ids.tolist())}
    for i in range(pool.count):
        pieces = pool.pieces((0,), i)
        assert all(b in ends for b in pieces[:, 1])
        assert len({places[begin] for begin in pieces[:, 0].tolist()}) == 1


def test_an_index_is_built_once_and_again_where_it_is_damaged(tmp_path: Path) -> None:
    row = documents(tmp_path, [50, 60, 70])
    (folder,) = indices(tmp_path / "store.index")
    inode = (folder / "ids.bin").stat().st_ino
    documents(tmp_path, [50, 60, 70])
    assert (folder / "ids.bin").stat().st_ino == inode
    ids = row.ids.tolist()
    (folder / "ids.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="must have"):
        SamplerIndex(folder)
    assert documents(tmp_path, [50, 60, 70]).ids.tolist() == ids
    assert indices(tmp_path / "store.index") == [folder]


def test_an_index_goes_to_the_cache_where_the_store_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "store.index").write_text("in the way")
    assert len(documents(tmp_path, [50, 60, 70])) == 180
    assert len(indices(tmp_path / "cache" / "farspan" / "index")) == 1


@pytest.mark.parametrize("packing", ["concat", "best_fit", "decomposition"])
def test_documents_that_are_too_long_are_split_left_out_or_refused(tmp_path: Path, packing: str) -> None:
    lengths = [100, 16, 64, 30, 65, 40, 8, 50]
    documents = np.cumsum([0, *lengths])
    kept = {i for i, n in enumerate(lengths) if n <= 64}

    def seen(how: str) -> tuple[set[int], Any]:
        found = batches(tmp_path, lengths, 64, packing=packing, too_long=how)
        tokens = np.concatenate([s.tokens[s.counted] for step in range(20) for s in found.batch(0, step)])
        return set((np.searchsorted(documents, tokens) - 1).tolist()), found

    split, skipped = seen("split"), seen("skip")
    assert split[0] == set(range(8)) and skipped[0] == kept
    assert split[1].longest_piece == 64 and split[1].fingerprint != skipped[1].fingerprint
    assert skipped[1].report()[-1] == (
        "data.too_long=skip: 2 documents with more than data.max_length=64 tokens, 165 together, are left out"
    )
    with pytest.raises(ValueError, match="error: there are 2 documents .* longest has 100; must be skip or split, or"):
        seen("error")
