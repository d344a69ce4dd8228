from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.samplers.decompose import OVERLONG, Table, split

LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
WIKIPEDIA = Table(LENGTHS, [2_265_088, 1_595_392, 850_944, 353_280, 121_600, 37_248])
DCLM = Table(LENGTHS, [14_581_760, 12_279_808, 7_587_840, 3_230_208, 1_320_192, 577_664])
FLEXSP = Path(__file__).parents[4] / "shared" / "data" / "wikipedia_document_lengths.npy"


def test_the_published_tables() -> None:
    """The authors' README (apple/ml-dataset-decomposition), from its bucket counts alone."""
    assert (WIKIPEDIA.tokens, DCLM.tokens) == (3_794_796_544, 34_545_336_320)
    assert (round(DCLM.mean_length), round(WIKIPEDIA.mean_length)) == (2507, 1971)
    assert (round(8192 / DCLM.mean_length, 2), round(8192 / WIKIPEDIA.mean_length, 2)) == (3.27, 4.16)
    cycle = DCLM.cycle(28_795_904_000, 8, 4096 * 256 * 8, [32, 16, 8, 4, 2, 1])  # a shard of each of 8 GPUs
    assert cycle.weights == [1472, 1248, 776, 328, 134, 60]
    assert cycle.sequences == [1_507_328, 1_277_952, 794_624, 335_872, 137_216, 61_440]
    assert cycle.tokens == 3_607_101_440


def pieces_of(lengths: list[int], low: int, high: int, overlong: str) -> list[tuple[int, int]]:
    ends = np.cumsum(lengths)
    found = []
    for k, begins in split(ends - lengths, np.array(lengths), low, high, overlong):
        assert low <= k <= high
        found += [(begin, begin + (1 << k)) for begin in begins.tolist()]
    return sorted(found)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20), st.integers(0, 5), st.sampled_from(OVERLONG))
def test_pieces_follow_each_other_and_leave_less_than_the_shortest(lengths: list[int], low: int, overlong: str) -> None:
    found = pieces_of(lengths, low, 7, overlong)
    begin = 0
    for length in lengths:
        at = begin
        for a, b in [piece for piece in found if begin <= piece[0] < begin + length]:
            assert a == at
            at = b
        assert 0 <= begin + length - at < 1 << low
        begin += length


@given(st.lists(st.integers(1, 255), min_size=1, max_size=20))
def test_a_document_is_split_as_its_length_is_written_in_binary(lengths: list[int]) -> None:
    begin = 0
    for length in lengths:
        sizes = [b - a for a, b in pieces_of(lengths, 0, 7, "random") if begin <= a < begin + length]
        assert sizes == [1 << k for k in range(7, -1, -1) if length >> k & 1]
        begin += length


def test_every_bucket_gets_the_same_of_overlong_documents() -> None:
    counts = np.zeros(14)
    for k, begins in split(np.arange(300) * 800_000, np.full(300, 800_000), 8, 13):
        counts[k] += len(begins)
    tokens = counts[8:] * 2.0 ** np.arange(8, 14)
    assert np.all(np.abs(tokens / tokens.mean() - 1) < 0.05)


def test_an_overlong_document_may_be_cut_into_the_longest() -> None:
    assert pieces_of([100], 2, 4, "longest") == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 80), (80, 96), (96, 100)]
    assert [b - a for a, b in pieces_of([31], 2, 4, "random")] == [16, 8, 4]


@pytest.mark.skipif(not FLEXSP.exists(), reason="the file of document lengths is not here")
def test_what_is_left_out_of_wikipedia() -> None:
    lengths = np.load(FLEXSP).astype(np.int64)
    for overlong, context in (("random", 1385), ("longest", 1690)):
        counts = [0] * 6
        for k, begins in split(np.cumsum(lengths) - lengths, lengths, 8, 13, overlong):
            counts[k - 8] += len(begins)
        table = Table(LENGTHS, counts)
        assert round(1 - table.tokens / lengths.sum(), 3) == 0.124
        assert abs(table.mean_length / 2 - context) < 1
