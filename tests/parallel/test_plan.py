"""Plans without a process group: what the static scheduler makes, and what `check` refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from parallel.collectives import Comm
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.schedule.static import Static
from parallel.sequence.attention import GatherKeys
from parallel.sequence.place import place
from parallel.sequence.states import GatherEffects


@pytest.mark.parametrize("layout", ["auto", "contiguous"])
@pytest.mark.parametrize("data", [1, 2, 3])
@pytest.mark.parametrize("sequence", [1, 2, 4])
@pytest.mark.parametrize("limit", [None, 40, 1000])
def test_every_static_plan_runs_every_token_once(data, sequence, limit, layout):
    lengths = [n for n in (100, 1, 64, 2, 3, 150, 32, 8) if limit is None or n <= limit * sequence]
    plan = Static(tokens_per_rank=limit, layout=layout).plan(5, lengths, data=data, sequence=sequence)
    plan.check(data * sequence)
    for micro in plan.micro_steps:
        for group in micro.groups:
            for held in group.spans:
                assert limit is None or sum(e - b for b, e in held) <= limit
                assert len({e - b for b, e in held}) <= 1


def test_zigzag_balances_causal_work_and_refuses_what_it_cannot_cut():
    (micro,) = Static(layout="zigzag").plan(0, [64], data=1, sequence=4).micro_steps
    work = [sum(sum(range(b + 1, e + 1)) for b, e in held) for held in micro.groups[0].spans]
    assert len(set(work)) == 1
    with pytest.raises(ValueError, match="zigzag: 65 tokens"):
        Static(layout="zigzag").plan(0, [65], data=1, sequence=4)


def test_the_longest_sequences_are_spread_first():
    plan = Static().plan(0, [10, 90, 20, 80], data=2, sequence=1)
    assert [g.sequences for g in plan.micro_steps[0].groups] == [(0, 1), (2, 3)]


def test_a_sequence_that_no_group_holds_is_refused():
    with pytest.raises(ValueError, match="tokens_per_rank=10: 2 ranks hold 20 tokens, a sequence has 30"):
        Static(tokens_per_rank=10).plan(0, [30], data=1, sequence=2)


def plan(*groups, lengths=(10,)):
    return Plan(0, tuple(lengths), (MicroStep(tuple(groups)),))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (plan(Group((0, 1), (0,), (((0, 5),), ((6, 10),)))), "leave or repeat"),
        (plan(Group((0, 1), (0,), (((0, 6),), ((5, 10),)))), "leave or repeat"),
        (plan(Group((0, 1), (0,), (((0, 5),), ((5, 9),)))), "cover 9 of 10"),
        (plan(Group((0,), (0,), (((0, 10),),))), "partition"),
        (plan(Group((0,), (0,), (((0, 10),),)), Group((1,), (0,), (((0, 10),),))), "the plan runs"),
        (plan(Group((0, 1), (0,), (((0, 10),), ())), lengths=(10, 3)), "the plan runs"),
        (plan(Group((0, 1), (1,), (((0, 10),), ()))), "the plan runs sequences"),
        (plan(Group((0, 1), (-1,), (((0, 10),), ()))), "the plan runs sequences"),
        (plan(Group((0, 1), (0,), (((0, 10),),))), "1 lists of spans"),
        (plan(Group((0, 1), (0,), (((0, 3), (8, 10)), ((3, 8),)))), r"rank 0: its spans .* differ in length"),
        (plan(Group((0, 1), (0,), ((), ())), lengths=(0,)), "every sequence a token"),
        (Plan(0, (10,), ()), "a plan needs a micro-step"),
        (Plan(0, (), (MicroStep((Group((0, 1), (), ((), ())),)),)), "a plan needs a micro-step and a sequence"),
    ],
)
def test_a_plan_that_loses_or_repeats_something_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong.check(2)


def test_the_order_in_which_ranks_and_spans_are_listed_means_nothing():
    listed = Group((1, 0), (0,), (((0, 2), (8, 10)), ((5, 8), (2, 5))))
    assert listed == Group((0, 1), (0,), (((2, 5), (5, 8)), ((0, 2), (8, 10))))
    plan(listed).check(2)


def test_a_sequence_that_begins_inside_a_document_is_refused():
    inside = SimpleNamespace(
        tokens=np.arange(3), targets=np.arange(3), positions=np.arange(3) + 2, counted=np.ones(3, bool)
    )
    options = {"device": torch.device("cpu"), "recurrence": GatherEffects(), "attention": GatherKeys()}
    with pytest.raises(ValueError, match="must begin with a document's first token"):
        place(Group((0,), (0,), (((0, 3),),)), [inside], Comm((0,), 0), **options)


def test_a_plan_reads_as_text():
    text = Static().plan(3, [8], data=2, sequence=2).text()
    assert text.splitlines() == [
        "step 3: 1 sequences, 8 tokens",
        "  micro-step 0",
        "    #0 (8) on rank 0: [0, 2) [6, 8)  rank 1: [2, 4) [4, 6)",
        "    nothing on rank 2: idle",
        "    nothing on rank 3: idle",
    ]
