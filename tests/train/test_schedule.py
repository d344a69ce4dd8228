"""Learning rates at the points their papers fix, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.phases import COOLDOWNS, TAILS, Schedule
from train.schedules import WSD, Anneal, Constant, Cosine, Infinite, Phases, Power

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


# notes of 2403.08763's code at T=1000: warm-up 10, cooldown 600, constant 250, 3e-4 / 1.65e-4 / 3e-5, alpha 10.
PUBLISHED = {
    "cosine": {5: 1.5e-4, 160: 2.8023e-4, 310: 2.3250e-4, 460: 1.8477e-4, 610: 1.65e-4, 860: 1.65e-4, 930: 7.0356e-5},
    "inverse_sqrt": {160: 2.1004e-4, 310: 1.8563e-4, 460: 1.7302e-4, 610: 1.65e-4, 700: 1.65e-4, 1000: 3e-5},
}


@pytest.mark.parametrize("shape", COOLDOWNS)
def test_infinite_has_the_published_values(shape):
    schedule = Infinite(warmup=10, cooldown=600, constant=250, anneal=140, level=0.55, floor=0.1, shape=shape)
    schedule.check(BUDGET)
    for t, rate in PUBLISHED[shape].items():
        assert 3e-4 * schedule.multiplier(t, BUDGET) == pytest.approx(rate, rel=3e-5), "as far as they are printed"
    for t in range(10, 610, 7):  # the formulas, as they are written there
        n, high, low = t - 10, 3e-4, 1.65e-4
        root = (1 / math.sqrt(1 + 10 * n / 600) - 1) / (1 / math.sqrt(11) - 1)
        cosine = low + (high - low) / 2 * (1 + math.cos(math.pi * n / 600))
        want = cosine if shape == "cosine" else high + (low - high) * root
        assert 3e-4 * schedule.multiplier(t, BUDGET) == pytest.approx(want, rel=1e-9)
    for t in range(860, 1001, 9):
        want = 1.65e-4 * (3e-5 / 1.65e-4) ** ((t - 860) / 140)
        assert 3e-4 * schedule.multiplier(t, BUDGET) == pytest.approx(want, rel=1e-9)


def test_the_other_curves_have_the_values_of_their_formulas():
    same = {"rel": 1e-9, "abs": 1e-12}
    power = Power(warmup=100, exponent=-0.51, decay=200, floor=0.0)
    for t in range(100, 801, 50):
        assert power.multiplier(t, BUDGET) == pytest.approx((t / 100) ** -0.51, **same)
    assert power.multiplier(900, BUDGET) == pytest.approx(8**-0.51 / 2, **same)  # linear, from where it is
    vaswani = Power(warmup=40, exponent=-0.5)  # 1706.03762, equation 3, over its largest value
    for t in range(1, 1001, 37):
        assert vaswani.multiplier(t, BUDGET) == pytest.approx(min(t**-0.5, t * 40**-1.5) / 40**-0.5, **same)
    held = Power(warmup=20, hold=80, exponent=-0.51)  # 2408.13359: min(eta, a n^b)
    for t in range(20, 1001, 37):
        assert held.multiplier(t, BUDGET) == pytest.approx(min(1.0, (t / 100) ** -0.51), **same)
    minicpm = WSD(warmup=10, decay=100, floor=0.5 ** (100 / 25), tail="exponential")  # 0.5 ** ((s - S) / T)
    root = WSD(warmup=10, decay=100, floor=0.0, tail="sqrt")
    for t in range(900, 1001, 11):
        assert minicpm.multiplier(t, BUDGET) == pytest.approx(0.5 ** ((t - 900) / 25), **same)
        assert root.multiplier(t, BUDGET) == pytest.approx(1 - math.sqrt((t - 900) / 100), **same)
    assert [Constant(warmup=10).multiplier(t, BUDGET) for t in (5, 10, 999)] == [0.5, 1, 1]
    assert Anneal(floor=0.1, begin=200, start=0.5).multiplier(600, BUDGET) == pytest.approx(0.3, **same)


def test_what_there_was_before_is_as_it_was_bit_for_bit():
    def wsd(t, budget):  # the formulas of the first version
        warmup = 0.05 * budget
        left = (budget - t) / (0.4 * budget)
        return t / warmup if t < warmup else 0.02 + (1 - 0.02) * min(1.0, max(0.0, left))

    def cosine(t, budget):
        warmup = 0.05 * budget
        done = min(1.0, (t - warmup) / max(1.0, budget - warmup))
        return t / warmup if t < warmup else 0.1 + (1 - 0.1) * 0.5 * (1 + math.cos(math.pi * done))

    for budget in (720_896, 4096 * 7, 12_288):
        for step in range(budget // 2048):
            t = step * 2048 + 1024
            assert WSD(warmup=0.05, decay=0.4, floor=0.02).multiplier(t, budget) == wsd(t, budget)
            assert Cosine(warmup=0.05, floor=0.1).multiplier(t, budget) == cosine(t, budget)


def tokens(least: int, most: int) -> st.SearchStrategy:
    return st.integers(least, most)


share = st.floats(0.01, 1.0)
where = {"begin": tokens(0, 50_000), "start": st.floats(0.0, 2.0)}
ANY: st.SearchStrategy[Schedule] = st.one_of(
    st.builds(WSD, warmup=tokens(1, 9000), decay=tokens(0, 9000), floor=share, tail=st.sampled_from(TAILS), **where),
    st.builds(Cosine, warmup=tokens(1, 9000), floor=share, **where),
    st.builds(Constant, warmup=tokens(1, 9000), **where),
    st.builds(Power, warmup=tokens(1, 9000), hold=tokens(0, 900), exponent=st.floats(-1, -0.1), floor=share,
              decay=tokens(0, 9000), tail=st.sampled_from(TAILS), **where),
    st.builds(Infinite, warmup=tokens(1, 9000), cooldown=tokens(1, 9000), anneal=tokens(0, 9000), level=share,
              floor=share, shape=st.sampled_from(COOLDOWNS), **where),
    st.builds(Anneal, floor=share, tail=st.sampled_from(TAILS), begin=tokens(0, 50_000), start=share),
    st.builds(
        lambda lines, **kw: Phases(phases=[*map(list, lines), [1 - sum(x[0] for x in lines), 0.5, "cosine"]], **kw),
        st.lists(st.tuples(st.floats(0.01, 0.2), share, st.sampled_from(("linear", "cosine", "sqrt", "inverse_sqrt"))),
                 min_size=1, max_size=4), **where,
    ),
)  # fmt: skip


@given(schedule=ANY, budget=tokens(90_000, 900_000))
def test_no_joint_has_a_jump_and_phases_fill_the_budget(schedule, budget):
    schedule.check(budget)
    begin = schedule.begin
    phases = [phase for phase in schedule.phases(budget - begin) if phase.end > phase.begin]
    assert phases[0].begin == 0 and phases[-1].end == pytest.approx(budget - begin)
    assert phases[0].value(0.0) == pytest.approx(schedule.start)
    for before, after in zip(phases, phases[1:], strict=False):
        assert before.end == pytest.approx(after.begin)
        assert before.value(before.end) == pytest.approx(after.value(after.begin), rel=1e-9, abs=1e-9)
        at = begin + after.begin
        near = [schedule.multiplier(at + d, budget) for d in (-1e-6, 0, 1e-6)]
        assert max(near) - min(near) < 2e-3  # as a user sees it: sqrt leaves the root of a millionth of one token
    assert schedule.multiplier(budget + 5000, budget) == schedule.multiplier(budget, budget)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Infinite(warmup=10, cooldown=600, constant=250, anneal=100), "add up to 960 tokens: must be exactly the budg"),
        (Infinite(warmup=0.1, cooldown=0.6, anneal=0.4), "warmup 100 + cooldown 600 + anneal 400 add up to 1,100 tok"),
        (WSD(warmup=700, decay=0.4), "warmup 700 + decay 400 add up to 1,100 tokens: must be at most the budget, 1,00"),
        (Phases(phases=[[0.1, 1.0, "linear"], [0.5, 0.0, "sqrt"]]), "phase 1 100 + phase 2 500 add up to 600 tokens"),
        (Cosine(begin=1000), "schedule.begin=1000: must be below the budget, 1,000 tokens"),
        (WSD(warmup=500, decay=200, begin=400), "begin 400 + warmup 500 + decay 200 add up to 1,100 tokens"),
    ],
)
def test_phases_that_do_not_add_up_are_refused_and_say_to_what(schedule, words):
    with pytest.raises(ValueError) as error:
        schedule.check(BUDGET)
    assert words in str(error.value)


def test_a_budget_in_whole_steps_may_be_a_little_more_than_the_phases():
    Infinite(warmup=10, cooldown=600, constant=250, anneal=140).check(1000 + 95, batch_tokens=96)
    with pytest.raises(ValueError, match="add up to"):
        Infinite(warmup=10, cooldown=600, constant=250, anneal=140).check(1000 + 96, batch_tokens=96)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WSD(tail="square"), "schedule.tail=square: must be one of linear"),
        (lambda: WSD(tail="exponential", floor=0.0), "schedule.floor=0.0: must be above 0"),
        (lambda: Anneal(tail="exponential", floor=0.1, start=0.0), "schedule.start=0.0: must be above 0"),
        (lambda: Power(exponent=0.5), "schedule.exponent=0.5: must be below 0"),
        (lambda: Power(warmup=0), "schedule.warmup=0: must be above 0"),
        (lambda: Infinite(cooldown=0), "schedule.cooldown=0: must be above 0"),
        (lambda: Infinite(floor=0.0), "schedule.floor=0.0: must be above 0"),
        (lambda: Infinite(shape="sqrt"), "schedule.shape=sqrt: must be one of cosine"),
        (lambda: Cosine(begin=-1), "schedule.begin=-1: must not be negative"),
        (lambda: Phases(phases=[]), "schedule.phases"),
        (lambda: Phases(phases=[[0.5, 1.0]]), "must be lines of"),
        (lambda: Phases(phases=[[0.5, 1.0, "wave"]]), "wave must be one of linear"),
        (lambda: Phases(phases=[[1.0, 0.5, "constant"]], start=1.0), "must stay at 1.0"),
        (lambda: Phases(phases=[[1.0, 0.5, "exponential"]]), "begin and end above 0"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_by_name(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)
