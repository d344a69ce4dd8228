import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data.samplers.apportion import Shares


@st.composite
def shares(draw: st.DrawFn) -> tuple[list[tuple[int, list[int]]], list[int | None]]:
    """Phases of weights, and caps."""
    size = draw(st.integers(1, 6))
    weights = st.lists(st.integers(0, 9), min_size=size, max_size=size)
    begins = sorted(draw(st.sets(st.integers(1, 150), max_size=3)))
    phases = [(begin, draw(weights)) for begin in (0, *begins)]
    assume(all(map(any, (w for _, w in phases))))
    return phases, draw(st.lists(st.none() | st.integers(0, 60), min_size=size, max_size=size))


@given(shares(), st.integers(0, 200))
def test_any_draw_reached_directly_is_the_one_of_the_row(given_: tuple, first: int) -> None:
    phases, caps = given_
    found = Shares(phases, caps)
    end = 250 if found.total is None else min(found.total, 250)
    counts = [0] * len(caps)
    for n, (who, before) in enumerate(found.draws(0, end)):
        if n == first:
            assert found.before(n) == tuple(counts)
            assert found.draws(n, 1) == [(who, before)]
        assert counts[who] == before
        counts[who] += 1
    assert found.before(end) == tuple(counts) and sum(counts) == end


@given(shares())
def test_who_has_given_its_cap_leaves_and_the_others_go_on_by_their_weights(given_: tuple) -> None:
    phases, caps = given_
    found = Shares(phases[:1], caps)
    weights = phases[0][1]
    open_ = [k for k, cap in enumerate(caps) if cap is None and weights[k]]
    if found.total is not None:
        assert not open_
        assert found.before(found.total) == tuple(c if w else 0 for c, w in zip(caps, weights, strict=True))
        with pytest.raises(IndexError):
            found.draws(found.total, 1)
        return
    late, later = found.before(10_000), found.before(20_000)
    for k, (cap, weight) in enumerate(zip(caps, weights, strict=True)):
        if cap is not None and weight:
            assert late[k] == later[k] == cap
        elif k in open_:
            share = Fraction(weight, sum(weights[i] for i in open_))
            assert abs(later[k] - late[k] - 10_000 * share) <= 1 + len(caps) / 2


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any), st.integers(0, 10**15))
def test_each_gives_within_half_their_number_of_its_weight(weights: list[int], draw: int) -> None:
    for given_, weight in zip(Shares([(0, weights)]).before(draw), weights, strict=True):
        assert abs(given_ - Fraction(draw * weight, sum(weights))) <= Fraction(len(weights), 2)


def test_largest_remainders_would_take_a_draw_back() -> None:
    """Why it is not those: with 6, 6 and 2 of 14, 10 draws would be 4, 4, 2 and 11 draws 5, 5, 1."""

    def largest_remainders(draw: int, weights: list[int]) -> list[int]:
        aims = [Fraction(draw * w, sum(weights)) for w in weights]
        found = [math.floor(aim) for aim in aims]
        rest = sorted(range(len(aims)), key=lambda k: found[k] - aims[k])
        for k in rest[: draw - sum(found)]:
            found[k] += 1
        return found

    assert (largest_remainders(10, [6, 6, 2])[2], largest_remainders(11, [6, 6, 2])[2]) == (2, 1)
    counts = [Shares([(0, [6, 6, 2])]).before(n)[2] for n in range(200)]
    assert counts == sorted(counts)


def test_weights_change_where_they_are_said_to() -> None:
    found = Shares([(0, [1, 0]), (100, [1, 3])])
    assert found.before(100) == (100, 0)
    assert found.before(500) == (200, 300)


@pytest.mark.parametrize("phases", [[(0, [1, -1])], [(5, [1])], [(0, [1]), (0, [1])], [(0, [1]), (9, [1]), (4, [1])]])
def test_bad_phases_are_refused(phases: list) -> None:
    with pytest.raises(ValueError):
        Shares(phases)
