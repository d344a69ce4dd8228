"""Measured costs: what `farspan plan cost.profile=true` stores, which run takes it, and which does not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.cli import main
from launch.config.compose import composed
from parallel.schedule.adaptive.scheduler import Adaptive
from parallel.schedule.mesh import Mesh
from tests.jobs import overrides
from train.cost_profile import CostProfile, LayerCost, found_profile, machine_name, model_key
from train.precision import dtypes
from train.run_config import RunConfig
from train.step_costs import costs_of

SHARED = {2: (1e-3, 4e-6), 4: (2e-3, 8e-6)}
LAYERS = (LayerCost("gla", 3, 0.0, 2e-5, 1e-3, shared=SHARED), LayerCost("attn", 1, 4e-9, 1e-5, 2e-3))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return composed(overrides(tmp_path, "scheduler=adaptive", f"cost.path={tmp_path / 'costs.json'}"))


def stored(config: RunConfig, **changes: Any) -> CostProfile:
    known = {"model": model_key(config), "machine": machine_name("cpu", 1)}
    profile = CostProfile(**{**known, "layers": LAYERS, "head": 1e-6, "wires": {2: (1e8, 1e-3)}, **changes})
    profile.write(Path(config.cost.path))
    return profile


def test_a_run_plans_by_its_measured_costs(config: RunConfig) -> None:
    profile = stored(config)
    with torch.device("meta"):
        model = config.model.build()
    model.compute = dtypes(config.precision.compute, "cpu")[0]
    costs, line = costs_of(config, Adaptive(), model, device="cpu", mesh=Mesh(sequence=4), threads=1)
    assert f"measured on {profile.machine}" in line and CostProfile.read(Path(config.cost.path)) == profile
    lengths = np.array([100.0, 1000.0])
    want = 3 * 2e-5 * lengths + 4e-9 * lengths**2 / 2 + 1e-5 * lengths + 1e-6 * lengths
    assert costs.computing(lengths).sum(0) == pytest.approx(want)
    assert costs.model.launch == pytest.approx(5e-3), "all layers' launches"
    assert costs.model.once > 0, "the weights' way over the wire"
    often = replace(config, engine=config.engine.having(reshard_after_forward=True))
    twice, _ = costs_of(often, Adaptive(), model, device="cpu", mesh=Mesh(sequence=4), threads=1)
    assert twice.model.launch - 5e-3 > costs.model.once / 2, "gathered twice a micro-step, each as much as reduced"
    assert costs.cluster.wire(4).bandwidth == 1e8 and costs.sending(2).sum() > 0
    plain = replace(profile, layers=tuple(replace(each, shared={}) for each in profile.layers))
    plain.write(Path(config.cost.path))
    without, _ = costs_of(config, Adaptive(), model, device="cpu", mesh=Mesh(sequence=4), threads=1)
    assert costs.fixed(4).sum() - without.fixed(4).sum() == pytest.approx(3 * 2e-3), "three layers of that kind"
    assert costs.sending(4).sum() - without.sending(4).sum() == pytest.approx(3 * 8e-6 / 4), "a fourth of the tokens"
    assert costs.fixed(1).sum() == without.fixed(1).sum() == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "another"}, "was measured with another model"),
        ({"machine": "ENIAC"}, "was measured on ENIAC, the workers run on"),
        ({"layers": ()}, "is no profile of costs"),
        (None, "no such file"),
    ],
)
def test_costs_of_another_machine_or_model_are_refused(config: RunConfig, changes: Any, told: str) -> None:
    if changes is not None:
        stored(config, **changes)
    with pytest.raises(ValueError) as found:
        found_profile(config, machine_name("cpu", 1))
    (line,) = str(found.value).splitlines()
    assert line.startswith(f"cost.path={config.cost.path}: {told}")
    assert f"`farspan plan cost.profile=true cost.path={config.cost.path}`" in line


def test_without_a_path_the_cache_may_have_one(config: RunConfig, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = replace(config, cost=replace(config.cost, path=None))
    assert found_profile(config, "here") is None
    deeper = config.model.having(layers=8)
    assert model_key(replace(config, model=deeper)) == model_key(config), "a layer costs what it costs"
    assert model_key(replace(config, model=config.model.having(dim=64))) != model_key(config)


@pytest.mark.e2e
def test_plan_measures_and_stores_the_costs(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "costs.json"
    more = [f"cost.path={path}", "cluster.threads=1", "cost.seconds=1", "cluster.workers=2"]
    assert main(["plan", *overrides(tmp_path, "cost.profile=true", *more)]) == 0
    said = capsys.readouterr().out
    assert "costs       measured on" in said and "1 x gla: " in said and f"stored in {path}" in said
    profile = CostProfile.read(path)
    found = {layer.kind: layer for layer in profile.layers}
    assert set(found) == {"gla", "attn"} and found["gla"].pair == 0 < found["gla"].token
    assert set(profile.wires) == {2} and json.loads(path.read_text())["format"] == 2
    assert all(set(layer.shared) == {2} for layer in profile.layers) and "2 ranks a sequence: " in said
    capsys.readouterr()
    assert main(["plan", *overrides(tmp_path, "scheduler=adaptive", *more)]) == 0
    assert "plans by costs measured on" in capsys.readouterr().out


def test_a_cluster_that_is_elsewhere_is_not_measured(tmp_path: Path, capsys: Any) -> None:
    assert main(["plan", *overrides(tmp_path, "cost.profile=true", "cluster=ray")]) == 2
    assert capsys.readouterr().err == (
        "farspan plan: cost.profile=true: measures this machine; must come with cluster=none or cluster=local\n"
    )
