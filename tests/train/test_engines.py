"""Engines: what each refuses, and that one which hides its state trains the same and exchanges checkpoints with FSDP.

The stand-in lays all parameters end to end and cuts the row at an odd place, as DeepSpeed and Megatron-core do. What
these packages do themselves, `python -m tests.engines` compares where they are installed; the slow tests here do too.
"""

import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from models.axes import declarations
from parallel.parallelize import parallelise
from parallel.schedule.mesh import Mesh
from tests import engines, megatron_on_cpu
from tests.jobs import order, overrides
from train.build import build
from train.checkpoints.hook import Checkpoints
from train.checkpoints.pieces import stretch_boxes
from train.engines import DeepSpeed, refusals
from train.engines.flat import FlatOptimizer, Stretch
from train.optim.build import build_optimizer

STEPS = 4


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2), (3, 1, 2), (1, 4)])
def test_a_stretch_is_boxes_that_lie_in_its_order(shape):
    flat = torch.arange(math.prod(shape))
    for begin in range(len(flat) + 1):
        for end in range(begin, len(flat) + 1):
            boxes = list(stretch_boxes(shape, begin, end))
            parts = [
                flat.view(shape)[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].flatten()
                for offset, size in boxes
            ]
            assert torch.equal(torch.cat([*parts, flat[:0]]), flat[begin:end])
            assert len(boxes) < 2 * max(len(shape), 1)


class Row(FlatOptimizer):
    """A stand-in: the row of all parameters, of which each rank steps the part up to or from a place in a tensor."""

    def __init__(self, model, inner):
        parameters = [p for group in inner.param_groups for p in group["params"]]
        begin, end = (sum(p.numel() for p in parameters) * (dist.get_rank() + i) // 2 for i in range(2))
        self.parts, self.stepping, at = [], {}, 0
        for group in inner.param_groups:
            own = []
            for p in group["params"]:
                low, high = max(begin, at), min(end, at + p.numel())
                if low < high:
                    own.append(p.detach().flatten()[low - at : high - at].clone().requires_grad_())
                    self.parts.append(Stretch(p, p.shape, low - at, own[-1], 0, high - low))
                at += p.numel()
            group["params"] = own
        super().__init__(model, model, inner)

    def begin(self, last):
        self.last = last

    def backward(self, loss):
        loss.backward()
        self.waiting = True

    def clip(self, largest):
        assert self.last, "the last micro-step is named"
        for p in self.placed.parameters():
            dist.all_reduce(p.grad)
        for part in self.parts:
            part.stepped.grad = part.parameter.grad.flatten()[part.begin : part.begin + part.length]
        size = self.norm(torch.device("cpu"))
        for gradient in self.gradients():
            gradient.mul_((largest / (size + 1e-6)).clamp(max=1.0))
        return size

    def step(self, closure=None):
        self.inner.step()
        with torch.no_grad():
            for p in self.placed.parameters():
                whole = torch.zeros(p.numel(), dtype=p.dtype)
                for part in self.parts:
                    if part.parameter is p:
                        whole[part.begin : part.begin + part.length] = part.stepped
                dist.all_reduce(whole)
                p.copy_(whole.view_as(p))
        self.zero_grad()

    def zero_grad(self, set_to_none=True):
        if self.waiting:
            self.placed.zero_grad()
            self.waiting = False

    def gradients(self) -> Iterator[torch.Tensor]:
        yield from (part.stepped.grad for part in self.parts)

    def stretches(self) -> Iterator[Stretch]:
        yield from self.parts


def stand_in(self, model, meshes, make, *, seed, dtype, cut=None):
    declared = declarations(model)
    settings: dict[str, Any] = {"remat": self.recompute, "reshard_after_forward": False, "sharded": False}
    parallelise(model, meshes, seed=seed, dtype=dtype, **settings)
    return Row(model, build_optimizer(make, model, declared))


def exchange(jobs):
    """Losses and last moments of FSDP and of the stand-in, each by itself and from the other's checkpoint; then of a
    run that begins from the other's weights alone."""
    DeepSpeed.build = stand_in
    every = {}
    for name, job in jobs.items():
        trainer, losses = build(job), []
        while trainer.state.step < (STEPS // 2 if "weights" in name else STEPS):
            record, _ = trainer.step()
            losses.append((record["loss"], record["grad_norm"]))
            if trainer.state.step == STEPS // 2 and "resume" not in job:
                trainer.hooks.of(Checkpoints).save()
        every[name] = losses
    return every


@pytest.fixture(scope="module")
def exchanged(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    more = [
        "precision=fp64",
        "model.layers=1",
        "train.tokens=20000",
        "cluster.workers=2",
        "scheduler.tokens_per_rank=96",
    ]
    keys = {"fsdp": [], "row": ["engine=deepspeed", "engine.recompute=full"]}
    jobs = {name: order(folder, folder / name, *more, *each) for name, each in keys.items()}
    for name, other in (("fsdp", "row"), ("row", "fsdp")):
        path = folder / other / "checkpoints" / f"step-{STEPS // 2}"
        jobs[f"{name} from {other}"] = order(folder, folder / f"{name}-2", *more, *keys[name], resume=str(path))
        jobs[f"{name}'s weights"] = order(
            folder, folder / f"{name}-3", *more, *keys[name], "train.init_optimizer=keep", init_from=str(path)
        )
    return run(2, exchange, jobs, timeout=280)


def test_an_engine_with_parts_of_its_own_trains_as_fsdp_does(exchanged):
    for rank in exchanged:
        np.testing.assert_allclose(rank["row"], exchanged[0]["fsdp"], rtol=1e-10)
        assert rank["row"][-1][0] < rank["row"][0][0]


@pytest.mark.parametrize("name", ["fsdp from row", "row from fsdp"])
def test_a_checkpoint_goes_on_in_another_engine(exchanged, name):
    for rank in exchanged:
        np.testing.assert_allclose(rank[name], exchanged[0]["fsdp"][STEPS // 2 :], rtol=1e-10)


def test_a_run_may_begin_from_the_weights_and_moments_of_another_engine(exchanged):
    for rank in exchanged:
        np.testing.assert_allclose(rank["row's weights"], exchanged[0]["fsdp's weights"], rtol=1e-10)
    assert exchanged[0]["fsdp's weights"][0][0] < exchanged[0]["fsdp"][0][0] - 0.01, "it does not begin anew"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from launch.config.compose import composed

    return composed(overrides(tmp_path_factory.mktemp("config"), "engine=deepspeed", "cluster.workers=2"))


def refused(config, mesh=None, device="cpu", **more):
    with pytest.raises(ValueError) as error:
        refusals.refuse(replace(config, **more), mesh or Mesh(sequence=2), device)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["tensor", "pipeline", "expert", "replicate"])
def test_a_mesh_of_more_than_data_and_sequence_is_refused(config, name):
    line = refused(config, Mesh(**{name: 2}))
    assert line.startswith(f"parallel.{name}=2: must be 1") and line.endswith("with engine=deepspeed")


def test_what_an_engine_cannot_do_is_refused_by_its_key(config):
    def train(**values):
        return {"train": replace(config.train, **values)}

    def engine(**values):
        return {"engine": config.engine.having(**values)}

    cases: dict[str, dict[str, Any]] = {
        "optimizer=muon: must be adamw": {"optimizer": config.optimizer.having(_target_="train.optim.Muon")},
        "optimizer.fused=apex: must be": {"optimizer": config.optimizer.having(fused="apex")},
        "optimizer.amsgrad=true: must be false": {"optimizer": config.optimizer.having(amsgrad=True)},
        "precision.compute=fp64: must be": {"precision": replace(config.precision, compute="fp64")},
        "train.span_tokens=64: must be null": train(span_tokens=64),
        "train.clip_each=1.0: must be null": train(clip_each=1.0),
        "train.clip_value=1.0: must be null": train(clip_value=1.0),
        "tracking.norms=true: must be false": {"tracking": config.tracking.having(norms=True)},
        "engine.recompute=full: must be none with engine.zero=3": engine(zero=3, recompute="full"),
        "engine.tile=64: must be null with engine.zero=3": engine(zero=3, tile=64),
        "train.average=ema: must be none with engine.zero=3": train(average="ema") | engine(zero=3),
    }
    for line, more in cases.items():
        assert refused(config, **more).startswith(line)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"zero": 4}, "engine.zero=4: must be one of 1, 2, 3"),
        ({"offload": "disk"}, "engine.offload=disk: must be one of none, optimizer, weights"),
        ({"offload": "weights"}, "engine.offload=weights: must be none or optimizer with engine.zero=1"),
        ({"cpu_adam": True}, "engine.cpu_adam=true: must be false with engine.offload=none"),
        ({"recompute": "some"}, "engine.recompute=some: must be one of"),
        ({"tile": 0}, "engine.tile=0: must be at least 1, or null"),
    ],
)
def test_values_that_deepspeed_has_not(values, line):
    with pytest.raises(ValueError, match=line):
        DeepSpeed(**values)


def test_an_engine_that_is_not_here_says_what_to_install(config, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("deepspeed", "megatron") else there(name)
    )
    assert refused(config) == (
        "engine=deepspeed: needs the package deepspeed, which is not installed here: pip install 'farspan[deepspeed]'; "
        "accepts fsdp"
    )
    megatron = config.engine.having(_target_="train.engines.MegatronCore")
    assert "pip install 'farspan[megatron]'" in refused(config, device="cuda", engine=megatron)
    line = refused(config, engine=megatron)
    assert line.startswith("engine=megatron: needs CUDA") and line.endswith("accepts fsdp, deepspeed")
    refusals.refuse(replace(config, cluster=replace(config.cluster, kind="ray")), Mesh(sequence=2), "cpu")


def test_an_adam_that_cannot_be_compiled_is_refused(config, monkeypatch):
    monkeypatch.setattr(refusals, "installed", lambda kind: True)
    monkeypatch.setenv("PATH", "")
    engine = config.engine.having(offload="optimizer", cpu_adam=True)
    assert refused(config, engine=engine).startswith("engine.cpu_adam=true: must be false here")


def test_a_lock_of_a_compile_that_was_stopped_is_named(config, monkeypatch, tmp_path):
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(refusals, "installed", lambda kind: True)
    monkeypatch.setattr(refusals.shutil, "which", lambda name: name)
    engine = config.engine.having(offload="optimizer", cpu_adam=True)
    refusals.refuse(replace(config, engine=engine), Mesh(sequence=2), "cpu")  # somebody compiles at this moment
    os.utime(lock, (0, 0))
    assert refused(config, engine=engine).startswith(f"engine.cpu_adam=true: {lock} is left of a compile")


def test_an_engine_that_fails_its_trial_is_refused(config, monkeypatch):
    from launch.preflight import engine

    tries: list[str] = []
    monkeypatch.setattr(refusals, "installed", lambda kind: True)
    monkeypatch.setattr(engine, "failure", lambda name: tries.append(name) or "ImportError: libcudart")
    with pytest.raises(ValueError, match=r"engine=deepspeed: deepspeed does not work here \(ImportError: libcudart\)"):
        engine.check_engine(config, Mesh(sequence=2), "cpu")
    engine.check_engine(replace(config, cluster=replace(config.cluster, kind="ray")), Mesh(sequence=2), "cpu")
    assert tries == ["deepspeed"], "another machine's engine is not tried here"


@pytest.mark.slow
def test_deepspeed_trains_as_fsdp_does_and_exchanges_checkpoints(tmp_path):
    pytest.importorskip("deepspeed")
    chosen = {name: keys for name, keys in engines.ENGINES.items() if "CPU Adam" not in name}
    layouts = (engines.Layout(1, 1), engines.Layout(2, 2, ("scheduler.tokens_per_rank=96",)))
    for what, error in engines.compare(engines.Runs(tmp_path, 10), chosen, layouts):
        assert error < engines.TOLERANCE, what


def holding_a_step_back(job, steps, save):
    """Losses where the guard holds back the third step: its gradients must be gone when the next one begins."""
    trainer, values = build(job), []
    decide = trainer.guard.decide
    while trainer.state.step < steps:
        held = len(values) == 2
        trainer.guard.decide = lambda *args, held=held: decide(*args).fill_(held)
        values.append(trainer.step()[0]["loss"])
    return values


@pytest.mark.slow
def test_deepspeed_drops_the_gradients_of_a_step_that_is_held_back(tmp_path):
    pytest.importorskip("deepspeed")
    chosen = {"fsdp": (), **{name: keys for name, keys in engines.ENGINES.items() if "CPU Adam" not in name}}
    runs = [engines.Run(f"run-{i}", keys, entry=holding_a_step_back) for i, keys in enumerate(chosen.values())]
    layout = engines.Layout(2, 2, ("scheduler.tokens_per_rank=96",))
    losses = engines.Runs(tmp_path, 5).run(layout, *runs)
    for i, name in enumerate(chosen):
        assert engines.apart(losses[f"run-{i}"], losses["run-0"][0]) < engines.TOLERANCE, name


@pytest.mark.slow
def test_megatron_behind_stand_ins_for_cuda_trains_as_fsdp_does(tmp_path):
    pytest.importorskip("megatron.core")
    for what, error in megatron_on_cpu.compare(engines.Runs(tmp_path, 6)):
        assert error < engines.TOLERANCE, what
