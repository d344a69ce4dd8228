"""A layer that is recomputed sends what it sent, in the same order; and nothing twice where the policy keeps it (T11).

A step leaves nothing of its graph behind.
"""

import gc
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from torch.autograd.function import BackwardCFunction

from models.lm import LM
from parallel.collectives import LEDGER
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.sequence.attention import GatherKeys, MeshKeys, Ring, Ulysses
from parallel.sequence.states import AllScan, GatherEffects, Relay
from tests import parity
from tests.parallel.matrix import layout_spans
from tests.parity import Sample, small_model

pytestmark = pytest.mark.dist

SAMPLE = Sample((3, 50, 1, 42))
LENGTH = len(SAMPLE.tokens)
CASES: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "gather, gather": (GatherEffects(), GatherKeys(), "contiguous", {}),
    "relay, ring": (Relay(), Ring(), "zigzag", {}),
    "allscan, usp": (AllScan(2), MeshKeys(), "contiguous", {"heads": 2, "kv_heads": 1}),  # two by two
    "relay, ulysses": (Relay(), Ulysses(), "idle rank", {}),
    "allscan, window": (AllScan(3), GatherKeys(), "unequal", {"window": 9, "sinks": 2}),
}
QUICK = ("gather, gather", "relay, ring")  # of every run of the tests
EACH = [pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in CASES]
Sent = tuple[str, int]  # purpose, bytes


@dataclass
class Record:
    """What this rank receives in a step, in order, between marks: a layer's number as it begins, -1 as it ends."""

    events: list[Sent | int] = field(default_factory=list)

    def build(self, attention: dict[str, Any]) -> LM:
        model = small_model(attention)
        for name, layer in model.layers.items():
            layer.register_forward_pre_hook(lambda *_, n=int(name): self.events.append(n))
            layer.register_forward_hook(lambda *_: self.events.append(-1))
        return model

    def sent(self) -> list[Sent]:
        return [event for event in self.events if not isinstance(event, int)]

    def passes(self) -> list[tuple[int, list[Sent]]]:
        """What was sent after each mark."""
        found: list[tuple[int, list[Sent]]] = []
        for event in self.events:
            if isinstance(event, int):
                found.append((event, []))
            else:
                found[-1][1].append(event)
        return found


def record(case: str, remat: str) -> tuple[Record, dict[str, float]]:
    """A step on this rank, and how its loss and gradients differ from one process."""
    effects, keys, layout, attention = CASES[case]
    taken = Record()
    honest = type(LEDGER).add

    def add(group: str, purpose: str, received: int) -> None:
        taken.events.append((purpose, received))
        honest(LEDGER, group, purpose, received)

    spans = layout_spans(layout, 4, LENGTH)
    assert spans is not None
    plan = Plan(0, (LENGTH,), (MicroStep((Group((0, 1, 2, 3), (0,), spans),)),))
    taken.events.append(-1)
    LEDGER.add = add  # type: ignore[method-assign]
    got = parity.spread(
        [SAMPLE], plan, "fp64", remat, attention=attention, recurrence=effects, keys=keys, build=taken.build
    )
    del LEDGER.add
    assert taken.sent()[-1][0] == "loss", "which parity.spread sums at the end"
    return taken, parity.differences(got, wanted(case))


@cache
def wanted(case: str) -> tuple:
    return parity.truth([SAMPLE], "fp64", CASES[case][3])


def every_policy(case: str) -> dict[str, tuple[Record, dict[str, float]]]:
    return {remat: record(case, remat) for remat in ("none", "full", "selective")}


def every_case(cases: list[str]) -> tuple[dict[str, dict[str, tuple[Record, dict[str, float]]]], list[str]]:
    """By case and policy; and the nodes of graphs that outlive the steps."""
    found = {case: every_policy(case) for case in cases}
    for _ in range(40):  # the thread of the last crossing may hold its work for a moment more
        gc.collect()
        left = sorted(type(x).__name__ for x in gc.get_objects() if issubclass(type(x), BackwardCFunction))
        if not left:
            break
        time.sleep(0.05)
    return found, left


@pytest.fixture(scope="module")
def quick(run):
    """One world for all of them."""
    return run(4, every_case, list(QUICK))


@pytest.fixture(scope="module")
def rest(run):
    return run(4, every_case, [case for case in CASES if case not in QUICK])


@pytest.fixture
def recorded(request):
    """By rank, case and policy."""
    case = request.node.callspec.params["case"] if hasattr(request.node, "callspec") else QUICK[0]
    return [found for found, _ in request.getfixturevalue("quick" if case in QUICK else "rest")]


@pytest.mark.parametrize("world", ["quick", pytest.param("rest", marks=pytest.mark.slow)])
def test_a_step_leaves_nothing_of_its_graph_behind(request, world):
    """A node that holds its own output is in a circle through autograd, which no collection frees: each step would
    leave its effects and states."""
    assert [left for _, left in request.getfixturevalue(world)] == [[]] * 4


@pytest.mark.parametrize("case", EACH)
def test_a_layer_computed_again_sends_the_same_in_the_same_order(recorded, case):
    """Full recomputation repeats each layer's forward, entry by entry, and is otherwise as without."""
    for rank in recorded:
        plain, full = (rank[case][remat][0].passes() for remat in ("none", "full"))
        forward = {layer: sent for layer, sent in plain if layer >= 0}
        assert any(forward.values()), "or there is nothing to repeat"
        rest, seen = [], []
        for layer, sent in full:
            if layer in seen:  # in the backward pass
                first = forward[layer]
                assert sent[: len(first)] == first
                rest += sent[len(first) :]
            else:
                rest += sent
            seen += [layer] * (layer >= 0)
        assert sorted(seen) == sorted([*forward, *forward])
        assert rest == [event for _, sent in plain for event in sent]


@pytest.mark.parametrize("case", EACH)
def test_selective_recomputation_sends_nothing_twice(recorded, case):
    for rank in recorded:
        plain, selective, full = (rank[case][remat][0] for remat in ("none", "selective", "full"))
        assert selective.sent() == plain.sent()
        assert sum(layer >= 0 for layer, _ in selective.passes()) == 2 * sum(layer >= 0 for layer, _ in plain.passes())
        assert len(full.sent()) > len(plain.sent()), "or this would hold for any policy"


def test_collectives_come_in_the_same_order_on_every_rank(recorded):
    """Where all that is sent is collective, so that an order of one's own would wait for ever or mix up messages."""
    for remat in ("none", "full", "selective"):
        first, *others = (rank["gather, gather"][remat][0].sent() for rank in recorded)
        assert all(sent == first for sent in others)


@pytest.mark.parametrize("case", EACH)
def test_recomputed_gradients_are_those_of_one_process(recorded, case):
    for rank in recorded:
        for remat, (_, found) in rank[case].items():
            assert max(found.values()) <= parity.TOLERANCE["fp64"], (remat, max(found, key=found.get))
