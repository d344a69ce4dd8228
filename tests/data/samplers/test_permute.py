import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.samplers.permute import Permutation, number


@given(st.integers(1, 5000), st.integers(0, 2**63), st.text(max_size=3))
def test_every_place_has_one_value_and_every_value_one_place(size: int, seed: int, name: str) -> None:
    order = Permutation(size, seed, name)
    values = order(np.arange(size))
    assert sorted(values) == list(range(size))
    assert np.array_equal(order.inverse(values), np.arange(size))


@given(st.integers(1 << 40, 1 << 60), st.integers(0, 100), st.integers(0, (1 << 40) - 1))
def test_an_order_of_any_size_costs_the_same(size: int, seed: int, place: int) -> None:
    order = Permutation(size, seed)
    (value,) = order([place])
    assert 0 <= value < size and order.inverse([value])[0] == place


def test_keys_have_orders_of_their_own() -> None:
    orders = [Permutation(1000, *key)(np.arange(1000)) for key in [(0,), (1,), ("0",), (0, 0), (0, "x")]]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert np.count_nonzero(a == b) < 10


@pytest.mark.parametrize("size", [3, 10, 100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_value_is_as_likely_anywhere(size: int) -> None:
    """Chi-square of where value 0 and value 1 stand, and of how far apart, over keys: 5 sigma of its distribution."""
    draws = 20 * size
    places = np.array([Permutation(size, key).inverse([0, 1]) for key in range(draws)])
    for found in (places[:, 0], (places[:, 1] - places[:, 0]) % size):
        counts = np.bincount(found, minlength=size)
        cells = counts[1:] if found is not places[:, 0] else counts
        expected = draws / len(cells)
        chi = ((cells - expected) ** 2 / expected).sum()
        assert abs(chi - (len(cells) - 1)) < 5 * np.sqrt(2 * len(cells))


def test_neighbours_part() -> None:
    values = Permutation(1 << 16, 5)(np.arange(1 << 16))
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.02
    assert np.count_nonzero(np.diff(values) == 1) < 10


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run must meet the batches it would have met: a change here is a new `Permutation.version`."""
    content = b"".join(Permutation(size, 7, "x")(np.arange(size)).astype("<i8").tobytes() for size in (1, 5, 1000))
    assert Permutation.version == 1
    assert hashlib.sha256(content).hexdigest() == "818c0fa40ef9e63b7b50a984081f021178018b5f470e4e1e82b6a18cf8d7f4af"
    assert number(10**6, 7, "x") == 252921


def test_places_outside_are_refused() -> None:
    for places in ([10], [-1]):
        with pytest.raises(ValueError, match="of an order of 10"):
            Permutation(10, 0)(places)
