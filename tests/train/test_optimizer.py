"""Groups by axes; AdamW by each kernel; apex's, which a stand-in has the place of where it is not installed."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor

from models.axes import declarations, initialise
from parallel.mesh import everyone
from parallel.parallelize import parallelise, parameter_name
from tests.parity import small_model
from train.optim import apex_adam
from train.optim.adamw import AdamW
from train.optim.build import build_optimizer, moments, set_rate
from train.optim.muon import Muon

SETTINGS = {"lr": 0.02, "weight_decay": 0.1}
STEPS = 4
STAND_IN = '''
"""What is used of apex.optimizers.FusedAdam, as it documents itself: AdamW on plain tensors, steps by group."""

import torch
from torch.distributed.tensor import DTensor


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0):
        assert adam_w_mode and bias_correction
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), t, lr = group["betas"], group["step"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                assert p.numel() and not any(isinstance(x, DTensor) for x in (p, p.data, p.grad))
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                assert type(m) is torch.Tensor and m.shape == p.shape
                m.copy_(b1 * m + (1 - b1) * p.grad)
                v.copy_(b2 * v + (1 - b2) * p.grad**2)
                update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
                p.data.sub_(lr * (update + group["weight_decay"] * p.data))
'''


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """A folder with a stand-in for NVIDIA's apex, on the path."""
    (tmp_path / "apex/optimizers").mkdir(parents=True)
    (tmp_path / "apex/__init__.py").write_text("")
    (tmp_path / "apex/optimizers/__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def stepped(make, folder: Path | None = None, *, shard: bool, continued: bool = False) -> dict[str, np.ndarray]:
    """A small model's parameters after steps along fixed gradients; continued: torch's kernel makes the first two."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    with torch.device("meta" if shard else "cpu"):
        built = small_model()
    declared = declarations(built)
    if shard:
        parallelise(
            built, everyone(torch.device("cpu")), seed=1, dtype=torch.float32, remat="none", reshard_after_forward=True
        )
    else:
        initialise(built, seed=1)
    steps = build_optimizer(partial(AdamW, **SETTINGS, fused="none") if continued else make, built, declared)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        if continued and step == STEPS // 2:
            state = steps.state_dict()
            steps = build_optimizer(make, built, declared)
            steps.load_state_dict(state)
        set_rate(steps, 0.02 / (step + 1))
        for p in built.parameters():
            whole = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None) if shard else whole
        steps.step()
    found = {parameter_name(name): p.detach() for name, p in built.named_parameters()}
    return {name: (p.full_tensor() if shard else p).numpy() for name, p in found.items()}


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, b in want.items():
        assert np.linalg.norm(got[name] - b) <= 2e-6 * np.linalg.norm(b), name


def test_torchs_kernel_is_taken_on_a_cpu_repeats_its_bits_and_is_adamw():
    auto = AdamW([nn.Parameter(torch.zeros(1))], **SETTINGS)
    assert auto.param_groups[0]["fused"] is True
    make = partial(AdamW, **SETTINGS)
    got, again = stepped(make, shard=False), stepped(make, shard=False)
    assert all(np.array_equal(got[name], again[name]) for name in got)
    assert_close(got, stepped(partial(AdamW, **SETTINGS, fused="none"), shard=False))
    plain = stepped(partial(torch.optim.AdamW, **SETTINGS, betas=(0.9, 0.95), fused=True), shard=False)
    assert all(np.array_equal(got[name], plain[name]) for name in got)


def test_a_kernel_by_its_name():
    weight = nn.Parameter(torch.zeros(1))
    assert AdamW([weight], **SETTINGS, fused=True).param_groups[0]["fused"] is True
    assert not AdamW([weight], **SETTINGS, fused=False).param_groups[0]["fused"]
    with pytest.raises(ValueError, match="optimizer.fused=fast: must be one of auto, torch, apex, none"):
        AdamW([weight], **SETTINGS, fused="fast")


def test_apexs_kernel_steps_as_torchs(apex):
    want = stepped(partial(AdamW, **SETTINGS, fused="none"), shard=False)
    make = partial(AdamW, **SETTINGS, fused="apex")
    assert_close(stepped(make, shard=False), want)
    assert_close(stepped(make, shard=False, continued=True), want)


def test_muon_leaves_its_vectors_to_apexs_kernel(apex):
    want = stepped(partial(Muon, **SETTINGS, fused="none"), shard=False)
    assert_close(stepped(partial(Muon, **SETTINGS, fused="apex"), shard=False), want)


@pytest.mark.dist
def test_apexs_kernel_steps_shards(run, apex):
    want = stepped(partial(AdamW, **SETTINGS, fused="none"), shard=False)
    for got in run(3, stepped, partial(AdamW, **SETTINGS, fused="apex"), apex, shard=True, continued=True):
        assert_close(got, want)


def test_where_apex_cannot_be(apex, tmp_path):
    assert apex_adam.fused_adam() is not None
    weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(
        ValueError, match="optimizer.fused=apex: must be auto, torch or none where weights are on the c"
    ):
        AdamW([weight], **SETTINGS, fused="apex").check("cpu")
    with pytest.raises(ValueError, match="optimizer.fused=apex: must be torch or none with precision=fp64"):
        AdamW([nn.Parameter(torch.zeros(1, dtype=torch.float64))], **SETTINGS, fused="apex")
    with pytest.raises(ValueError, match="optimizer.amsgrad=true: must be false"):
        AdamW([weight], **SETTINGS, fused="apex", amsgrad=True)


def test_the_package_of_that_name_on_pypi_is_another_one(tmp_path, monkeypatch):
    """It is not even imported."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert apex_adam.fused_adam() is None
    with pytest.raises(ValueError, match="optimizer.fused=apex: NVIDIA's apex is not installed here"):
        AdamW([nn.Parameter(torch.zeros(1))], **SETTINGS, fused="apex")


@pytest.mark.gpu
def test_nvidias_apex_itself():
    if apex_adam.fused_adam() is None:
        pytest.skip("NVIDIA's apex is not installed")
    weights = [nn.Parameter(torch.ones(7, 5, device="cuda")) for _ in range(2)]
    pair = [AdamW([w], **SETTINGS, fused=kind) for w, kind in zip(weights, ("apex", "none"), strict=True)]
    for step in range(STEPS):
        gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(step)).cuda()
        for w, each in zip(weights, pair, strict=True):
            w.grad = gradient.clone()
            each.step()
    assert (weights[0] - weights[1]).norm() <= 2e-6 * weights[1].norm()


def groups_of(**options) -> dict[str, tuple[float, float]]:
    """By name of a parameter: weight decay, and the rate where the schedule says 1."""
    built = small_model()
    steps = build_optimizer(partial(AdamW, **SETTINGS, **options), built, declarations(built))
    set_rate(steps, 1.0)
    names = {p: name for name, p in built.named_parameters()}
    found = {names[p]: (g["weight_decay"], g["lr"]) for g in steps.param_groups for p in g["params"]}
    assert found.keys() == set(names.values())
    return found


def test_only_what_declares_it_decays():
    built = small_model()
    declared = declarations(built)
    for name, (decay, rate) in groups_of().items():
        assert decay == (0.1 if declared[name].decay else 0.0) and rate == 1.0
    plain = build_optimizer(partial(AdamW, **SETTINGS), built, declared)
    assert len(plain.param_groups) == 2, "as checkpoints have them"


def test_axes_without_decay_and_with_rates_of_their_own():
    found = groups_of(no_decay=["vocab"], rates={"vocab": 0.5, "embed": 0.1, "expert": 3.0})
    assert found["embedding"] == (0.0, pytest.approx(0.05)) and found["head.weight"] == (0.0, pytest.approx(0.05))
    assert found["layers.0.ffn.experts.down"] == (0.1, pytest.approx(0.3))
    assert found["layers.0.mixer.qkv.weight"] == (0.1, pytest.approx(0.1))
    assert found["norm.weight"] == (0.0, pytest.approx(0.1))
    for options in ({"no_decay": ["vocb"]}, {"rates": {"vocb": 1.0}}, {"rates": {"vocab": -1.0}}):
        with pytest.raises(ValueError, match="^optimizer.(no_decay|rates)"):
            groups_of(**options)


def test_muon_takes_the_axes_that_adamw_is_not_given():
    def taken(**options) -> set[str]:
        built = small_model()
        steps = build_optimizer(partial(Muon, **SETTINGS, **options), built, declarations(built))
        names = {p: name for name, p in built.named_parameters()}
        return {names[p] for g in steps.param_groups if g["muon"] for p in g["params"]}

    assert "layers.0.ffn.router.weight" in taken() and "embedding" not in taken()
    assert taken() - taken(adamw=["vocab", "expert"]) == {
        name for name in taken() if "experts" in name or "router" in name
    }
    for options in ({"momentum": 1.0}, {"steps": 0}, {"adamw": ["vocb"]}):
        with pytest.raises(ValueError, match="^optimizer.(momentum|steps|adamw)="):
            taken(**options)


def test_moments_are_counted_as_they_are_kept():
    for make in (partial(AdamW, **SETTINGS), partial(Muon, **SETTINGS)):
        built = small_model()
        counted = moments(make, built)
        steps = build_optimizer(make, built, declarations(built))
        for p in built.parameters():
            p.grad = torch.zeros_like(p)
        steps.step()
        kept = [x for state in steps.state.values() for key, x in state.items() if key != "step"]
        assert counted == sum(x.numel() for x in kept)
