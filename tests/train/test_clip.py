"""Clipping against a plain loop over whole gradients."""

import numpy as np
import pytest
import torch
from torch.distributed.tensor import distribute_tensor

import parallel.fsdp
from parallel.matrix_owners import wholes
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.mesh import Mesh
from parallel.shards import local
from tests.parity import small_model
from train.optim.clip import clip
from train.settings import TrainSettings

LIMITS = [
    {"largest": 0.7, "each": None, "value": None},
    {"largest": 1e9, "each": 1.5, "value": None},
    {"largest": 1e9, "each": None, "value": 0.5},
    {"largest": 3.0, "each": 1.5, "value": 0.5},
]


def gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    named = small_model().named_parameters()
    return {
        name: 0.3 * (1 + i % 3) * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for i, (name, p) in enumerate(named)
    }


def clipped(**sizes: int) -> list[tuple[float, dict[str, np.ndarray]]]:
    """For each of the limits, the norm before and the gradients after, of a sharded model."""
    with torch.device("meta"):
        model = small_model()
    meshes = Meshes(Mesh(**sizes), torch.device("cpu"))
    parallelise(model, meshes, seed=0, dtype=torch.float64, remat="none", reshard_after_forward=True)
    whole, found = gradients(), []
    for limits in LIMITS:
        named = {parameter_name(name): p for name, p in model.named_parameters()}
        for name, p in named.items():
            p.grad = distribute_tensor(whole[name].clone(), p.device_mesh, p.placements, src_data_rank=None)
        norm = clip(model, Groups().world_comm, **limits)
        found.append(
            (norm.item(), {n: x.numpy() for n, x in wholes({name: p.grad for name, p in named.items()}).items()})
        )
    return found


def by_hand(*, largest: float, each: float | None, value: float | None) -> tuple[float, dict[str, np.ndarray]]:
    found = {name: g.numpy() for name, g in gradients().items()}
    before = np.sqrt(sum((g**2).sum() for g in found.values()))
    if value is not None:
        found = {name: np.clip(g, -value, value) for name, g in found.items()}
    if each is not None:
        found = {name: g * min(1, each / (np.linalg.norm(g) + 1e-6)) for name, g in found.items()}
    norm = np.sqrt(sum((g**2).sum() for g in found.values()))
    return before, {name: g * min(1, largest / (norm + 1e-6)) for name, g in found.items()}


@pytest.mark.dist
@pytest.mark.parametrize(
    "sizes", [{}, pytest.param({"sequence": 3}, marks=pytest.mark.slow), {"expert": 2, "sequence": 2}], ids=str
)
def test_gradients_are_clipped_as_whole_ones(run, sizes):
    for found in run(Mesh(**sizes).world, clipped, **sizes):
        for limits, (norm, got) in zip(LIMITS, found, strict=True):
            before, want = by_hand(**limits)
            assert norm == pytest.approx(before, rel=1e-12)
            for name, b in want.items():
                assert np.linalg.norm(got[name] - b) <= 1e-12 * np.linalg.norm(b), (limits, name)


def experts_apart() -> list[float]:
    """The norm before clipping, as it is; then where experts are left out, and where each rank knows its own alone."""
    honest, found = parallel.fsdp._of_one_mesh, []

    def own(tensors):
        return torch.nn.utils.get_total_norm([local(x) for x in tensors])

    faults = (honest, lambda tensors: 0 * own(tensors), own)
    for fault in faults:
        parallel.fsdp._of_one_mesh = lambda x, fault=fault: (honest if x[0].device_mesh.ndim == 1 else fault)(x)
        found.append(clipped(expert=2)[0][0])
    return found


@pytest.mark.dist
def test_a_norm_without_the_experts_of_other_ranks_is_another(run):
    before, _ = by_hand(**LIMITS[0])
    for norm, without, own in run(2, experts_apart):
        assert norm == pytest.approx(before, rel=1e-12)
        assert without < 0.99 * before and own < 0.99 * before and without < own


def test_limits_bite():
    plain = gradients()
    for limits in LIMITS:
        _, found = by_hand(**limits)
        assert any(not np.allclose(found[name], g.numpy()) for name, g in plain.items())


@pytest.mark.parametrize("key", ["clip_each", "clip_value", "average_tokens", "average_count"])
def test_a_limit_is_above_nothing(key):
    with pytest.raises(ValueError, match=f"train.{key}=0: must be above 0"):
        TrainSettings(**{key: 0})


def test_kinds_are_named():
    with pytest.raises(ValueError, match="train.average=mean: must be one of none, ema, last"):
        TrainSettings(average="mean")
    with pytest.raises(ValueError, match="train.init_weights=ema: must be one of raw, average"):
        TrainSettings(init_weights="ema")
