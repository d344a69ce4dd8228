"""What a run goes on from, as a user asks for it: `farspan plan` of schedules, ramps and checkpoints, and its refusals.

The checkpoint is a folder in their format; nothing is trained here but what `tests/train/test_continued.py` resumes.
"""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch import paths
from launch.cli import main
from launch.commands import schedule_plot
from launch.config.compose import composed
from launch.preflight import continuation
from launch.preflight.checked import CheckedRun
from launch.preflight.configure import configure
from parallel.schedule.mesh import Mesh
from tests.jobs import overrides
from train.checkpoints import checkpoint

pytestmark = pytest.mark.composes

SHORT = ["cluster.workers=1", "train.tokens=19200"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("continued")


def flight(place: Path, *more: str, **found: Path) -> tuple[Any, list[str]]:
    """A configured run as the checks before these leave it, settled; and what it was told."""
    config = configure([*overrides(place), *SHORT, *more])
    said: list[str] = []
    made = CheckedRun(config, "cpu", Mesh(), {}, None, **found)
    return continuation.settled(made, said.append), said


@pytest.fixture(scope="module")
def parent(place: Path) -> Path:
    """A checkpoint without tensors, 9,600 tokens into a run of 19,200: its rate falls from 1e-2 to 1e-3 there."""
    path = place / "parent" / "checkpoints" / "step-25"
    path.mkdir(parents=True)
    more = ["optimizer.lr=1e-2", "schedule=cosine", "schedule.warmup=0", "schedule.floor=0.1"]
    config = configure([*overrides(place), *SHORT, *more])
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config.to_dict())))
    facts = {"format": checkpoint.FORMAT, "step": 25, "tokens": 9600, "model": {}, "files": {}}
    (path / checkpoint.MANIFEST).write_text(json.dumps(facts))
    return path


RATE = 1e-2 * (0.1 + 0.9 * 0.5)  # half of the cosine is done


@pytest.mark.parametrize("schedule", ["rewarm", "anneal", "wsd"])
def test_a_resumed_run_begins_where_the_checkpoint_stands_and_keeps_its_numbers(place, parent, schedule):
    more = [
        f"schedule={schedule}",
        "optimizer.lr=2e-2",
        *(["schedule.begin=null", "schedule.start=null"] * (schedule == "wsd")),
    ]
    made, said = flight(place, *more, resume=parent)
    node = made.config.schedule
    assert node["begin"] == 9600 and node["start"] == pytest.approx(RATE / 2e-2) and not said
    rate = 2e-2 * node.build().multiplier(9600, made.train.total_tokens)
    assert rate == pytest.approx(RATE, rel=1e-12), "no jump"
    made = continuation.settled(made, said.append)
    assert made.config.schedule == node, "resumed again, it has the same curve"


def test_a_new_run_begins_at_its_first_token_with_the_rate_of_its_parent(place, parent):
    node = flight(place, "schedule=rewarm", "optimizer.lr=1e-2", init_from=parent)[0].config.schedule
    assert node["begin"] == 0 and node["start"] == pytest.approx(0.55)
    node = flight(place, "schedule=rewarm")[0].config.schedule
    assert (node["begin"], node["start"]) == (0, 0.0), "a fresh one warms up from nothing"
    assert flight(place, "schedule=anneal")[0].config.schedule["start"] == 1.0


def test_a_rate_that_jumps_is_told(place, parent):
    _, said = flight(place, "schedule=constant", "optimizer.lr=1e-2", resume=parent)
    assert len(said) == 1 and "at token 9,600 the learning rate goes from 0.0055 to 0.01 at once" in said[0]


def test_moments_are_kept_only_where_they_are(place, parent):
    with pytest.raises(ValueError, match=r"^train.init_optimizer=keep: must be reset, .* holds no optimizer state"):
        flight(place, "train.init_optimizer=keep", init_from=parent)
    flight(place, "train.init_optimizer=reset", init_from=parent)


def test_a_plan_tells_and_draws_schedule_and_batch_size(place, capsys):
    picture = place / "curve.png"
    ramp = "train.batch_tokens=[[0,96],[9600,192]]"
    assert main(["plan", *overrides(place), *SHORT, "schedule=infinite", f"run.plot={picture}", ramp]) == 0
    said = capsys.readouterr().out
    for words in (
        "budget      150 steps of 96 to 192 tokens = 19,200",
        "schedule    warmup from 0: 0 to 0.003",
        "constant from 11,712: 0.00165 to 0.00165",
        "anneal from 16,512: 0.00165 to 0.0003",
        "tokens of a step: 96 from 0, 192 from 9,600",
    ):
        assert words in said, said
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", head[16:])) > 300


def test_the_curve_is_that_of_the_steps_to_come(place, parent):
    made, _ = flight(place, "schedule=anneal", "train.batch_tokens=[[0,96],[9600,192]]", resume=parent)
    tokens, rates, sizes = schedule_plot.points(made)
    assert tokens[0] == 9600 and tokens[-1] == 19_200 and rates[0] == pytest.approx(RATE) and rates[-1] == 0
    assert set(sizes) == {192}


REFUSED = {
    "schedule.warmup=15000": "schedule: warmup 15,000 + decay 7,680 add up to 22,680 tokens: must be at most",
    "schedule.tail=round": "schedule.tail=round: must be one of linear, cosine, sqrt, exponential",
    "train.batch_tokens=[[5,384]]": "train.batch_tokens=[[5, 384]]: must be a number of tokens above 0, or lines of",
    "train.init_optimizer=all": "train.init_optimizer=all: must be one of reset, keep, reset_mean, reset_moments",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_mistake_costs_one_line(place, capsys, override):
    assert main(["plan", *overrides(place), *SHORT, override]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"farspan plan: {REFUSED[override]}") and err.count("\n") == 1


def test_a_job_is_told_where_a_run_lies_that_it_starts_from(tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, lies in (("base", "runs/base"), ("here", "here"), ("gone", "gone")):
        config = replace(composed([]), init_from=given)
        assert paths.with_absolute_paths(config).init_from == str(tmp_path / lies)
