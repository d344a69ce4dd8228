"""Learning rates at the points their papers fix, and what is refused."""

import math

import pytest

from train.schedule import WSD, Cosine

BUDGET = 1000


def test_wsd_warms_up_stays_and_decays_to_the_floor():
    rate = WSD(warmup=100, decay=0.3, floor=0.1).multiplier
    assert [rate(t, BUDGET) for t in (0, 50, 100, 400, 700)] == [0, 0.5, 1, 1, 1]
    assert rate(850, BUDGET) == pytest.approx(0.1 + 0.9 * 0.5)
    assert rate(1000, BUDGET) == pytest.approx(0.1) and rate(1200, BUDGET) == pytest.approx(0.1)


def test_the_plateau_of_wsd_does_not_depend_on_the_budget():
    rate = WSD(warmup=100, decay=100, floor=0.0).multiplier
    assert all(rate(t, 1000) == rate(t, 5000) for t in range(0, 900, 50))


def test_cosine_is_halfway_at_half_time():
    rate = Cosine(warmup=0.1, floor=0.2).multiplier
    assert rate(50, BUDGET) == 0.5 and rate(100, BUDGET) == pytest.approx(1)
    assert rate(550, BUDGET) == pytest.approx(0.6) and rate(1000, BUDGET) == pytest.approx(0.2)
    assert rate(325, BUDGET) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_no_warmup_and_no_decay():
    assert WSD(warmup=0, decay=0).multiplier(0, BUDGET) == 1
    assert WSD(warmup=0, decay=0).multiplier(BUDGET, BUDGET) == 1


@pytest.mark.parametrize("wrong", [{"warmup": -1}, {"warmup": 1.5}, {"decay": -0.1}, {"floor": 2.0}])
def test_what_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"schedule.{next(iter(wrong))}"):
        WSD(**wrong)
