"""Runs that replay: what they say of each corpus is what a plain loop finds, on any layout, resumed or not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.config.compose import composed
from models.sequence import Whole
from tests.jobs import SMALL, corpus
from train.build import build
from train.checkpoints.hook import Checkpoints
from train.tracking.record import records

pytestmark = pytest.mark.dist

KEPT = [key for key in SMALL if key != "data=text"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("continual")
    rng = np.random.default_rng(1)
    (place / "new").mkdir()
    for i in range(40):
        digits = rng.integers(0, 10, size=int(rng.integers(20, 600)))
        (place / "new" / f"{i:02}.txt").write_text("".join(map(str, digits)))
    corpus(place / "old")
    return place


def order(place: Path, name: str, *more: str, **rest: Any) -> dict[str, Any]:
    (place / name).mkdir(exist_ok=True)
    sources = [
        f"data.sources.{name}.data.{key}={value}"
        for name in ("new", "old")
        for key, value in (("corpus", "text"), ("path", place / name), ("store", place / f"{name}-store"))
    ]
    config = composed([*KEPT, "data=mixture", *sources, "data.replay=0.25", "data.heldout_tokens=768", *more])
    return {"config": config, "run_dir": str(place / name), "device": "cpu", **rest}


def parent(job: dict[str, Any]) -> str:
    trainer = build(job)
    for _ in range(3):
        trainer.step()
    return str(trainer.hooks.of(Checkpoints).save())


def trained(job: dict[str, Any], stop: int | None = None) -> dict[str, tuple[float, float]]:
    """Trains, as far as a checkpoint after `stop` steps; the loss on each source by a plain loop where the model is
    whole: on all windows, and on every other."""
    trainer = build(job)
    if stop is not None:
        trainer.progress.settings = replace(trainer.progress.settings, steps=stop)
    trainer.fit()
    if job["config"].cluster.workers > 1:
        return {}
    held = trainer.batches.heldout_by_source()
    return {name: (plain(trainer, windows), plain(trainer, windows[::2])) for name, windows in held.items()}


def plain(trainer: Any, windows: list[Any]) -> float:
    """Nats a target, one window after another, the ends of documents not asked for."""
    nats, asked = 0.0, 0
    for window in windows:
        tokens, positions = (torch.from_numpy(x)[None] for x in (window.tokens, window.positions))
        with torch.no_grad():
            logits = trainer.model(tokens, Whole.of(positions)).logits[0]
        targets = torch.from_numpy(np.where(window.targets == trainer.batches.tokenizer.DOCUMENT, -100, window.targets))
        nats += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
        asked += int((targets != -100).sum())
    return nats / asked


# Evaluations before the end read two of four windows of each source.
SHORT = ["train.steps=4", "train.evaluate_every=384", "train.evaluate_tokens=384", "precision=fp64", "tracking=none"]


@pytest.fixture(scope="module")
def weights(place: Path) -> str:
    from tests.world import run_world

    (path,) = run_world(1, parent, order(place, "parent", *SHORT, "cluster.workers=1"))
    return path


def test_what_is_forgotten_and_learnt_is_that_of_a_plain_loop_on_every_layout(run, place: Path, weights: str) -> None:
    found = {}
    for workers in (1, 3):
        job = order(place, f"child-{workers}", *SHORT, f"cluster.workers={workers}", init_from=weights)
        by_hand, *_ = run(workers, trained, job)
        found[workers] = records(place / f"child-{workers}" / "metrics.jsonl")
        if workers == 1:
            last = found[1][-1]
            for name, (whole, part) in by_hand.items():
                assert last["heldout"][name]["loss"] == pytest.approx(whole, rel=1e-12)
                assert last["heldout_part"]["heldout"][name]["loss"] == pytest.approx(part, rel=1e-12)
                assert abs(whole - part) > 1e-3
    one, three = found[1], found[3]
    assert [r["step"] for r in one] == [0, 1, 2, 3, 4] and "loss" not in one[0]
    assert [r["heldout_tokens"] for r in one] == [768, 384, 384, 384, 768]
    assert [r.get("heldout_part", {}).get("tokens") for r in one] == [384, None, None, None, 384]
    for r, other in zip(one, three, strict=True):
        now = {name: means["loss"] for name, means in r["heldout"].items()}
        before = one[0] if r["heldout_tokens"] == 768 else one[0]["heldout_part"]
        first = {name: means["loss"] for name, means in before["heldout"].items()}
        assert r["forgetting"] == {"old": now["old"] - first["old"]}
        assert r["adaptation"] == {"new": first["new"] - now["new"]}
        for name in ("old", "new"):
            assert other["heldout"][name]["loss"] == pytest.approx(now[name], rel=1e-12)
    assert one[0]["forgetting"]["old"] == 0 and one[-1]["adaptation"]["new"] > 0.05
    summary = json.loads((place / "child-1" / "summary.json").read_text())
    assert summary["forgetting"] == one[-1]["forgetting"] and summary["heldout"] == one[-1]["heldout"]


@pytest.mark.slow
def test_a_resumed_run_measures_from_its_first_beginning(run, place: Path, weights: str) -> None:
    more = [*SHORT, "train.checkpoint_every=384", "cluster.workers=1", "schedule=constant", "schedule.warmup=0"]
    run(1, trained, order(place, "halted", *more, init_from=weights), 2)
    run(1, trained, order(place, "halted", *more, resume=str(place / "halted" / "checkpoints" / "step-2")))
    run(1, trained, order(place, "through", *more, init_from=weights))
    halted, through = (records(place / name / "metrics.jsonl") for name in ("halted", "through"))
    assert [r["step"] for r in halted] == [0, 1, 2, 3, 4] and {r["attempt"] for r in halted} == {1, 2}
    for one, other in zip(halted, through, strict=True):
        if one["step"] == 2:  # the end of the first: all is read, the part beside
            assert one["heldout_part"]["loss"] == other["heldout_loss"] and one["heldout_tokens"] == 768
        else:
            assert one["forgetting"] == other["forgetting"] and one["heldout_loss"] == other["heldout_loss"]


def test_a_run_from_nothing_forgets_nothing(run, place: Path) -> None:
    run(1, trained, order(place, "union", *SHORT, "cluster.workers=1"))
    found = records(place / "union" / "metrics.jsonl")
    assert found[0]["step"] == 1 and set(found[-1]["heldout"]) == {"new", "old"}
    assert not any("forgetting" in r for r in found)
