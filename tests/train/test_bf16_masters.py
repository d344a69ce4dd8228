"""`precision.masters=bf16`: weights that the optimizer rounds at random are the same on every layout, and in a run that
goes on; in fp64, where gradients of layouts differ too little to turn a rounding."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from models.axes import declarations
from models.recipes import BF16_WEIGHTS, LowPrecision, apply, policy
from parallel.collectives import LEDGER
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.comm_volume import of_weights
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Plan
from parallel.schedule.static import Static
from parallel.sequence.attention import GatherKeys
from parallel.sequence.states import GatherEffects
from parallel.tensor import TensorPiece
from tests.jobs import order
from tests.parallel.test_recipes import BATCH, LENGTHS, PLANS, hybrid
from tests.parity import BALANCE, logical
from tests.train.test_muon_resume import load_then_go_on, same, save_then_go_on
from train.execute import Executor
from train.metrics.comm_trace import weight_units
from train.optim import AdamW, CompactAdamW, Muon, random_rounding
from train.optim.build import build_optimizer

MAKE: dict[str, Any] = {
    "adamw": partial(AdamW, lr=1e-2),
    "muon": partial(Muon, lr=1e-2),
    "int8": partial(CompactAdamW, lr=1e-2),
}
ALONE = Static(tokens_per_rank=256).plan(0, LENGTHS, data=1, sequence=1)
LAYOUTS: dict[str, tuple[Mesh | None, Plan]] = {
    **{name: (None, plan) for name, plan in PLANS.items()},
    "expert": (Mesh(data=1, sequence=1, expert=2), PLANS["data"]),
    "tensor": (Mesh(data=1, sequence=1, tensor=2), ALONE),
}


def trained(optimizer: str, mesh: Mesh | None, plan: Plan, steps: int = 2) -> dict[str, np.ndarray]:
    """Every weight after some steps, whole; those of 16 bits, and no others, have names that open with bf16."""
    groups = Groups(mesh)
    with torch.device("meta"):
        model = hybrid()
    model.compute = torch.float64
    apply(model, policy(model), LowPrecision(BF16_WEIGHTS, masters=True))
    declared = declarations(model)
    meshes = Meshes(groups.mesh, torch.device("cpu"))
    parallelise(model, meshes, seed=1, dtype=torch.float64, remat="none", reshard_after_forward=True)
    steps_of = build_optimizer(MAKE[optimizer], model, declared)
    executor = Executor(model, groups, torch.device("cpu"), GatherEffects(), GatherKeys(), BALANCE)
    for _ in range(steps):
        executor.train(plan, BATCH)
        assert all(p.grad.to_local().dtype == torch.float64 for p in model.parameters() if p.grad is not None)
        steps_of.step()
        steps_of.zero_grad()
    weights = {parameter_name(name): p.detach() for name, p in model.named_parameters()}
    few = {name for name, p in weights.items() if p.to_local().dtype == torch.bfloat16}
    whole = logical(model, weights).items()
    return {f"bf16 {name}" if name in few else name: x.double().numpy() for name, x in whole}


def on_two_ranks(names: list[str], optimizers: list[str]) -> dict[Any, Any]:
    found: dict[Any, Any] = {(o, name): trained(o, *LAYOUTS[name]) for o in optimizers for name in names}
    with patch.object(random_rounding, "first_row", lambda p: 0):  # bits of a rank's own places
        found["broken"] = trained(optimizers[0], *LAYOUTS[names[0]])
    LEDGER.take()
    trained(optimizers[0], *LAYOUTS["data"], steps=1)
    found["bytes"] = {event.purpose: count for event, count in LEDGER.take()[0].items()}
    return found


def differing(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> list[str]:
    """Weights that differ, by any bit where they are bf16."""
    assert got.keys() == want.keys()
    near = {name: 0 if name.startswith("bf16") else 1e-10 for name in want}
    return [name for name in want if np.abs(got[name] - want[name]).max() > near[name]]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("names", "optimizers"),
    [
        (["data", "sequence"], ["adamw"]),
        pytest.param([*LAYOUTS], ["muon", "int8"], marks=pytest.mark.slow),
        pytest.param(["expert", "tensor"], ["adamw"], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_round_as_one_process_bit_for_bit(run, names, optimizers):
    want = {optimizer: run(1, trained, optimizer, None, ALONE)[0] for optimizer in optimizers}
    for each in want.values():
        few = {name for name in each if name.startswith("bf16 ")}
        assert "bf16 layers.0.ffn.experts.gate_up" in few and "bf16 layers.1.mixer.q.weight" in few
        assert not any(
            word in name for name in few for word in ("router", "head", "embedding", "norm", "beta", "gate.")
        )
        assert all(np.array_equal(each[name], torch.tensor(each[name]).bfloat16().double()) for name in few)
    with torch.device("meta"):
        model = hybrid()
    units = weight_units(model, itemsize=8, reshard=True, coded={n.partition(" ")[2]: BF16_WEIGHTS.weight for n in few})
    foretold = of_weights(units, 2, len(PLANS["data"].micro_steps))
    for got in run(2, on_two_ranks, names, optimizers):
        for (optimizer, name), weights in ((key, value) for key, value in got.items() if isinstance(key, tuple)):
            assert not differing(weights, want[optimizer]), (optimizer, name)
        assert any(name.startswith("bf16") for name in differing(got["broken"], want[optimizers[0]]))
        assert got["bytes"]["weights"] == foretold.bytes["weights"]


@pytest.mark.dist
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_bit_for_bit(run, tmp_path, optimizer):
    more = [f"optimizer={optimizer}", "precision=bf16_masters", "precision.compute=fp64", "train.steps=20"]
    place = tmp_path / "before"
    saved, losses, end = run(1, save_then_go_on, order(place, place / "run", "cluster.workers=1", *more))[0]
    path = str(place / "run" / "checkpoints" / "step-2")
    job = order(tmp_path, tmp_path / "after", "cluster.workers=1", *more, resume=path)
    loaded, again, after, *_ = run(1, load_then_go_on, job)[0]
    assert same(loaded, saved) and again == losses and same(after, end)
    assert (Path(path) / "manifest.json").exists()


def test_small_updates_of_a_weight_are_not_lost():
    """1,000 additions of 1e-4 to 1 are 1.10, and 1.00 to the nearest."""
    p, nearest = nn.Parameter(torch.ones(2048, dtype=torch.bfloat16)), torch.ones(2048, dtype=torch.bfloat16)
    p.stream = 3  # type: ignore[attr-defined]
    for step in range(1, 1001):
        random_rounding.put(p, p.detach().float() + 1e-4, step)
        nearest = (nearest.float() + 1e-4).bfloat16()
    assert nearest.eq(1).all() and abs(p.float().mean().item() - 1.1) < 2e-3


def test_places_of_a_tensor_ranks_piece_are_those_of_the_whole():
    for along in (0, 1):
        value = torch.arange(60).view(*((5, 12) if along else (12, 5)))
        piece = TensorPiece(tuple(value.shape), 2, along, 2, (8, 4))
        for rank in range(2):
            p: Any = SimpleNamespace(piece=piece, tensor_comm=SimpleNamespace(rank=rank), ndim=2)
            part = piece.of(value, rank)
            found = random_rounding.places(p, 3, part.numel() - 3, part.shape, torch.device("cpu"))
            assert found.equal(part.flatten()[3:]), (along, rank)
