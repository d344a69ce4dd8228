"""The part of the held-out text that evaluations before the end read, and what they are compared by."""

from types import SimpleNamespace

import numpy as np

from parallel.schedule.plan import Plan
from parallel.schedule.static import Static
from train.evaluation.heldout import apart, divided
from train.tracking.wandb import comparable


def test_a_part_of_the_held_out_windows_is_spread_over_each_source_and_never_empty() -> None:
    windows = [SimpleNamespace(tokens=np.zeros(8), number=n) for n in range(10)]
    by_source = {"a": windows, "b": windows[:3]}

    def chosen(tokens: int | None) -> list[list[int]]:
        parts = divided(by_source, tokens)
        for name, part in parts.items():
            assert sorted([*part.read, *part.rest], key=lambda window: window.number) == by_source[name]
        return [[window.number for window in part.read] for part in parts.values()]

    assert chosen(64) == [[0, 2, 5, 7], [0, 1, 2]] and chosen(32) == [[0, 5], [0, 1]]
    assert chosen(1) == [[0], [0]] and chosen(None) == chosen(10**6) == [[*range(10)], [0, 1, 2]]


def test_groups_of_half_the_ranks_have_windows_of_their_own_where_there_are_enough() -> None:
    def training(lengths: list[int]) -> Plan:
        return Static(layout="contiguous").plan(1, lengths, data=2, sequence=4)

    plan, at_once = apart(training, data=2, sequence=4)
    assert at_once == 4 and plan([64] * 3) == training([64] * 3)
    (micro,) = plan([64] * 5).micro_steps
    assert [group.ranks for group in micro.groups] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert sorted(len(group.sequences) for group in micro.groups) == [1, 1, 1, 2]
    assert apart(training, data=2, sequence=3) == (training, 1)


def test_the_best_evaluation_is_that_of_what_all_of_them_read() -> None:
    part, whole = {"heldout_loss": 2.0}, {"heldout_loss": 1.5, "heldout_part": {"loss": 2.5}}
    assert [comparable(record) for record in (part, whole, {})] == [2.0, 2.5, None]
