"""Bytes that travel to experts and back, as a world has counted them, against the formulas: every rank, every byte."""

from functools import partial
from typing import Any

import pytest
import torch

from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from parallel.collectives import LEDGER
from parallel.expert import pad
from parallel.matrix_owners import wholes
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.comm_volume import Traffic, of_weights
from parallel.schedule.expert_volume import of_experts
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.sequence.attention import GatherKeys
from parallel.sequence.states import GatherEffects
from tests.parity import BALANCE, Sample, assert_close
from train.execute import Executor
from train.metrics.comm_trace import expert_calls, expert_units, weight_units

pytestmark = pytest.mark.dist

MESH = Mesh(expert=2, sequence=2)
BATCH = [Sample((20, 1, 27)), Sample((11, 13), seed=1), Sample((7,), seed=2)]
EVEN = (((0, 24),), ((24, 48),))
UNEVEN = (((0, 5),), ((5, 24),))
# Spans of four lengths; then groups that change, and an idle rank.
PLAN = Plan(
    0,
    (48, 24, 7),
    (
        MicroStep((Group((0, 1), (0,), EVEN), Group((2, 3), (1,), UNEVEN))),
        MicroStep((Group((0, 2, 3), (2,), (((0, 3),), ((3, 4),), ((4, 7),))), Group((1,), (), ((),)))),
    ),
)


def build(capacity: float | None) -> LM:
    moe = partial(MoE, num_experts=6, top_k=2, hidden=8, shared_hidden=4, capacity_factor=capacity)
    gla = partial(MIXERS["gla"], heads=2)
    blocks = {
        "moe": partial(Block, mixer=gla, ffn=moe),
        "dense": partial(Block, mixer=gla, ffn=partial(SwiGLU, hidden=4)),
    }
    return LM(vocabulary=32, dim=16, layers=3, pattern=["moe", "dense", "moe"], blocks=blocks)


def counted(capacity: float | None, padded: bool, remat: str) -> dict[str, Any]:
    """A step of this rank: bytes and calls by "axis/purpose", how often it chose each expert, every gradient."""
    with torch.device("meta"):
        model = build(capacity)
    model.compute = torch.float64
    parallelise(
        model, Meshes(MESH, torch.device("cpu")), seed=1, dtype=torch.float64, remat=remat, reshard_after_forward=True
    )
    if padded:
        pad(model)
    executor = Executor(model, Groups(MESH), torch.device("cpu"), GatherEffects(), GatherKeys(), BALANCE)
    LEDGER.take()
    tally = executor.train(PLAN, BATCH)
    bytes, calls = ({"/".join(entry): n for entry, n in part.items()} for part in LEDGER.take())
    gradients = wholes({parameter_name(n): p.grad for n, p in model.named_parameters()})
    return {
        "bytes": bytes,
        "calls": calls,
        "load": {n: c.numpy() for n, c in tally.load.items()},
        "gradients": {n: x.numpy() for n, x in gradients.items()},
    }


CELLS = {
    "counted": (None, False, "none"),
    "counted, limited": (0.8, False, "none"),
    "padded, recomputed": (0.8, True, "full"),
}


def every_cell() -> dict[str, dict[str, Any]]:
    return {name: counted(*cell) for name, cell in CELLS.items()}


def axis(cell: dict[str, Any], name: str) -> tuple[dict[str, int], ...]:
    return tuple({p: n for p, n in cell[kind].items() if p.startswith(f"{name}/")} for kind in ("bytes", "calls"))


def named(traffic: Traffic, name: str) -> tuple[dict[str, int], ...]:
    return tuple({f"{name}/{p}": n for p, n in part.items()} for part in (traffic.bytes, traffic.calls))


def test_rows_and_weights_are_counted_as_foretold(run):
    found = run(4, every_cell)
    with torch.device("meta"):
        models = {capacity: build(capacity) for capacity in (None, 0.8)}
    for model in models.values():
        model.compute = torch.float64
    for name, (capacity, padded, remat) in CELLS.items():
        calls = expert_calls(models[capacity])
        told = of_experts(PLAN, MESH, calls, padded=padded, recompute=remat)
        for rank, each in enumerate(found):
            if padded:
                assert axis(each[name], "expert") == named(told[rank], "expert"), (name, rank)
            elif capacity is None and rank in (0, 2):
                assert axis(each[name], "expert") == by_choices(found, name, rank, calls[0]), (name, rank)
    units = {"itemsize": 8, "reshard": True, "experts": 2}
    weights = of_weights(weight_units(models[None], **units), 4, 2)
    experts = of_weights(expert_units(models[None], **units), 2, 2)
    for each in found:
        assert axis(each["counted"], "experts") == named(experts, "experts")
        got = axis(each["counted"], "world")
        assert [{p: n for p, n in part.items() if "weights" in p} for part in got] == list(named(weights, "world"))
        limited, padded = each["counted, limited"], each["padded, recomputed"]  # the same numbers, whatever travels
        assert_close((1.0, padded["gradients"]), (1.0, limited["gradients"]), "fp64")
        assert padded["bytes"]["expert/expert rows"] > limited["bytes"]["expert/expert rows"]


def by_choices(found: list[dict], name: str, rank: int, call) -> tuple[dict[str, int], ...]:
    """Traffic of a rank, 0 or 2, that exchanges with the other: the loads of 1 and 3 lack a masked token."""
    total, other = Traffic(), rank ^ 2
    for layer, own in found[rank][name]["load"].items():
        theirs, half = found[other][name]["load"][layer], call.experts // 2
        here = slice(0, half) if rank < 2 else slice(half, None)
        there = slice(half, None) if rank < 2 else slice(0, half)
        rows = [(int(theirs[here].sum()), int(own[there].sum())), (0, 0)]  # of both micro-steps together
        for both in (call.counted(2, *each) for each in rows):
            total.include(both.forward)
            total.include(both.backward)
    return named(total, "expert")
