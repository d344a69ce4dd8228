"""Loss and every parameter's gradient on every rank, against one process: the contract of the whole system."""

import json
from functools import cache

import pytest
import torch

from models.positions import Randomized, YaRN
from parallel.schedule.adaptive.cost import Cluster, Costs, Layer, Model, Wire
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.schedule.static import Static
from parallel.sequence.attention import GatherKeys, MeshKeys, Ring, Ulysses
from parallel.sequence.states import AllScan, Relay
from tests.parity import Sample, assert_close, spread, truth

pytestmark = pytest.mark.dist

# Documents on a span's edge, one before and after it, shorter than the convolution, of one token, over three ranks.
BATCH = [
    Sample((40, 24, 1, 1, 2, 60)),
    Sample((130, 3), masked=(60, 133), padding=3),
    Sample((31, 1, 32, 7), seed=3),
    Sample((5,)),
]
LENGTHS = [len(s.tokens) for s in BATCH]


def static(data: int, sequence: int, tokens_per_rank: int | None = None) -> Plan:
    return Static(tokens_per_rank=tokens_per_rank).plan(0, LENGTHS, data=data, sequence=sequence)


def unequal() -> Plan:
    """Four ranks: unequal spans, two spans on a rank, an idle rank, a rank without a span, groups that change."""
    first = MicroStep(
        (
            Group((0, 2), (0,), (((0, 50), (78, 128)), ((50, 78),))),
            Group((1, 3), (3,), (((0, 5),), ())),
        )
    )
    second = MicroStep((Group((0, 1, 3), (2, 1), (((0, 80),), ((80, 82),), ((82, 204),))), Group((2,), (), ((),))))
    return Plan(0, tuple(LENGTHS), (first, second))


def adaptive() -> Plan:
    """Four ranks of 130 tokens each, by the adaptive planner: a group of two beside two of one."""
    layer = Layer(1, pair=1e-3, token=0.01, token_bytes=1.0)
    model = Model("small", (layer,), launch=0.1, state_bytes=0.0, activation_bytes=1.0)
    costs = Costs(model, Cluster("four", 4, 130.0, {1: Wire(10.0)}))
    return Planner(costs, quantum=1).plan(LENGTHS).packing.plan(0, LENGTHS, 4)


def unequal_pair() -> Plan:
    """Two ranks: all sequences joined, a span of 3 tokens and one of the rest."""
    spans = (((0, 3),), ((3, sum(LENGTHS)),))
    return Plan(0, tuple(LENGTHS), (MicroStep((Group((0, 1), (0, 1, 2, 3), spans),)),))


def zigzag() -> Plan:
    """Two ranks, two spans each, causal work balanced: rank 0 holds the outer quarters."""
    steps = []
    for s, length in enumerate(LENGTHS[:3]):
        cut = [length // 4, length // 2, length - length // 4]
        spans = (((0, cut[0]), (cut[2], length)), ((cut[0], cut[1]), (cut[1], 2 * cut[1] - cut[0])))
        if spans[1][1][1] != cut[2]:  # an odd length: one span a rank
            spans = (((0, cut[1]),), ((cut[1], length),))
        steps.append(MicroStep((Group((0, 1), (s,), spans),)))
    steps.append(MicroStep((Group((0,), (3,), (((0, 5),),)), Group((1,), (), ((),)))))
    return Plan(0, tuple(LENGTHS), tuple(steps))


PLANS = {
    "one": (1, static(1, 1)),
    "one, accumulated": (1, static(1, 1, 140)),
    "sequence 2": (2, static(1, 2)),
    "data 2": (2, static(2, 1, 140)),
    "zigzag 2": (2, zigzag()),
    "sequence 4": (4, static(1, 4, 60)),
    "data 2 sequence 2": (4, static(2, 2, 80)),
    "unequal 4": (4, unequal()),
    "adaptive 4": (4, adaptive()),
}
# Layouts of the covering part of the matrix, and of tests/parallel/test_adaptive_parity.py.
ELSEWHERE = ("sequence 2", "sequence 4", "data 2", "data 2 sequence 2", "unequal 4", "adaptive 4")


def in_turn(plan: Plan, cases: dict[str, tuple[str, dict]]) -> dict:
    """Loss and gradients of each case, a precision and options of `spread`, in one world."""
    return {name: spread(BATCH, plan, precision, **more) for name, (precision, more) in cases.items()}


@cache
def wanted(precision: str, attention: str) -> tuple:
    return truth(BATCH, precision, json.loads(attention))


def equal_one_process(run, plan: str, cases: dict[str, tuple[str, dict]]) -> None:
    world, planned = PLANS[plan]
    for got in run(world, in_turn, planned, cases):
        for name, (precision, more) in cases.items():
            try:
                assert_close(got[name], wanted(precision, json.dumps(more.get("attention"))), precision)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("plan", [pytest.param(n, marks=[pytest.mark.slow] * (n in ELSEWHERE)) for n in PLANS])
def test_loss_and_gradients_equal_one_process(run, plan):
    equal_one_process(run, plan, {precision: (precision, {}) for precision in ("fp64", "fp32")})


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["zigzag 2", "unequal 4"])
def test_every_transport_of_effects_gives_the_same(run, plan):
    transports = {"relay": Relay(), "allscan 2": AllScan(2), "allscan 3": AllScan(3)}
    equal_one_process(run, plan, {name: ("fp64", {"recurrence": each}) for name, each in transports.items()})


KEYS = {
    "gather": (GatherKeys(2), ["zigzag 2", "unequal 4"], None),
    "ring": (Ring(), ["zigzag 2", "sequence 4", "unequal 4"], None),
    "ulysses": (Ulysses(), ["zigzag 2", "sequence 4"], None),
    "ulysses, three ranks": (Ulysses(), ["unequal 4"], {"heads": 12, "kv_heads": 6, "head_dim": 4}),
    "usp": (MeshKeys(), ["sequence 4"], {"heads": 2, "kv_heads": 1, "head_dim": 8}),  # two by two
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["zigzag 2", "sequence 4", "unequal 4"])
def test_every_transport_of_keys_gives_the_same(run, plan):
    cases = {name: (keys, attention) for name, (keys, plans, attention) in KEYS.items() if plan in plans}
    assert len(cases) >= 3
    equal_one_process(run, plan, {n: ("fp64", {"keys": k, "attention": a}) for n, (k, a) in cases.items()})


@pytest.mark.slow
def test_recomputed_activations_change_nothing(run):
    equal_one_process(run, "unequal 4", {"recomputed": ("fp64", {"remat": "full"})})


@pytest.mark.parametrize("precision", ["fp64", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["zigzag 2", "unequal 2"])
def test_windows_reach_across_ranks(run, name, precision):
    """A window with the document's first tokens in sight, normalised queries and keys, a gate, few channels rotated."""
    attention = {"window": 9, "sinks": 3, "qk_norm": True, "gate": True, "head_dim": 16}
    attention["positions"] = YaRN(factor=4, trained_length=64, fraction=0.5)
    plan = zigzag() if name == "zigzag 2" else unequal_pair()
    want = truth(BATCH, precision, attention)
    for got in run(2, spread, BATCH, plan, precision, attention=attention):
        assert_close(got, want, precision)


def test_randomised_positions_are_the_same_at_any_layout(run):
    attention = {"positions": Randomized(longest=500)}
    (want,) = run(1, spread, BATCH, static(1, 1), "fp64", attention=attention)
    assert abs(want[0] - truth(BATCH, "fp64")[0]) > 1e-6 * want[0]
    for got in run(2, spread, BATCH, zigzag(), "fp64", attention=attention):
        assert_close(got, want, "fp64")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_the_same_on_nccl(run, name):
    """fp64 on CUDA, a GPU a rank, against one process on the CPU."""
    world, plan = PLANS[name]
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    want = truth(BATCH, "fp64")
    for got in run(world, spread, BATCH, plan, "fp64", backend="nccl", device="cuda"):
        assert_close(got, want, "fp64")
