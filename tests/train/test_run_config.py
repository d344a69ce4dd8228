"""The type of a run: complete, frozen, and the same after every way that it travels."""

import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml

from launch.config.compose import composed
from launch.run.rundir import saved_config, write_config
from train.run_config import RunConfig

ROOT = Path(__file__).parents[2]
SEVERAL = (
    [],
    ["experiment=extend_context", "init_from=somewhere"],
    ["data=mixture", "data.sources.new.data.path=a", "data.sources.old.data.path=b"],
    ["cluster=slurm", "optimizer=muon", "train.batch_tokens=[[0,4096],[8192,8192]]", "schedule=infinite"],
)


@pytest.mark.parametrize("overrides", SEVERAL, ids=lambda words: words[0] if words else "default")
def test_it_is_the_same_after_every_way_that_it_travels(tmp_path, overrides):
    run = composed(overrides)
    assert RunConfig.of(run.to_dict()) == run  # to a job, as JSON is
    assert RunConfig.of(yaml.safe_load(yaml.safe_dump(run.to_dict()))) == run
    assert pickle.loads(pickle.dumps(run)) == run  # to a worker
    write_config(tmp_path, run, {"farspan": "0"})
    assert RunConfig.of(saved_config(tmp_path)) == run  # to a run that goes on


def test_nothing_writes_into_it():
    run = composed([])
    with pytest.raises(FrozenInstanceError):
        run.seed = 1  # type: ignore[misc]
    whole = run.to_dict()
    whole["model"]["blocks"].clear()
    whole["train"]["guard"]["window"] = 7
    assert run.model["blocks"] and run.train.guard.window != 7
    other = replace(run, data=run.data.having(max_length=64))
    assert other.data["max_length"] == 64 != run.data["max_length"]


def test_an_object_is_built_anew_each_time():
    schedule = composed([]).schedule
    assert schedule.target == "train.schedules.WSD" and schedule.build() is not schedule.build()
    assert schedule.get("no such key", 3) == 3


def test_the_launcher_reads_sections_and_builds_objects_by_the_type():
    """Outside the rooms that read configurations, nobody subscripts one by text or builds from one by name."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "launch").rglob("*.py"))
        if path.parent.name not in ("config", "preflight")
        for line in path.read_text().splitlines()
        if 'config["' in line or "construct(" in line
    ]
    assert not found
