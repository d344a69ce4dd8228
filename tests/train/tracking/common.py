"""A run's records as the loop makes them, and a run tracked from its first to its last."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.tracking import Facts, Tracking

KEY = "0123456789" * 4


def record(step: int, attempt: int = 1) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 4096,
        "time": 1761000000.0 + step,
        "attempt": attempt,
        "loss": 4.0 / step,
        "expert_load": {"layers.0": [0.1, 0.2, 0.3, 0.4]},
        "seconds": {"forward": 0.25},
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts(run: Path, **more: Any) -> Facts:
    return Facts(run_dir=run, name="a name", config={"seed": 7, "model": {"width": 64}}, **more)


def track(
    run: Path, steps: range, *, attempt: int = 1, about: dict[str, Any] | None = None, **options: Any
) -> tuple[str, list[str]]:
    """Track `steps` of a run, as the loop does, and return W&B's id and what was said."""
    said: list[str] = []
    tracker = Tracking(**options).open(facts(run, **(about or {})), said.append)
    for step in steps:
        tracker.log(record(step, attempt))
    tracker.finish({"loss": 0.5})
    assert read(run / "metrics.jsonl")[-len(steps) :] == [record(step, attempt) for step in steps]
    kept = run / "wandb-id"
    return kept.read_text().strip() if kept.exists() else "", said


def until(met: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.005)
