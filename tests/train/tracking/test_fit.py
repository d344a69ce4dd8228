"""Tracking inside a training run: attempts, failures, checkpoints, lineage, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.tracking import Cost, fully_tracked, measure
from tests.jobs import order, overrides
from tests.train.tracking.test_tensorboard import events, files, values
from tests.wandb_file import config, history, of_kind, offline_files, summary
from train.build import build
from train.loop import Trainer
from train.tracking import JsonlWriter, records

pytestmark = pytest.mark.dist
TRACKED = ["tracking.mode=offline", "tracking.tensorboard=true", "cluster.workers=1"]


def gradient_is_not_finite(trainer: Trainer, step: int) -> None:
    update = trainer._update
    trainer._update = lambda *given: (0.1, math.nan) if trainer.state.step + 1 == step else update(*given)


def data_is_lost(trainer: Trainer, step: int) -> None:
    batch = trainer.batches.batch

    def read(seed: int, index: int, skips: int = 0) -> Any:
        if index + 1 == step:
            raise OSError("the disk is gone\nand more")
        return batch(seed, index, skips)

    trainer.batches.batch = read


def attempts(*tries: tuple[dict[str, Any], Callable[[Trainer, int], None] | None, int]) -> list[str]:
    """Fit one order after another, each broken at a step or not; how each ended."""
    ends = []
    for job, break_at, step in tries:
        trainer = build(job)
        if break_at is not None:
            break_at(trainer, step)
        try:
            trainer.fit()
            ends.append("")
        except Exception as error:
            ends.append(type(error).__name__)
    return ends


@pytest.fixture(scope="module")
def broken_twice(run, tmp_path_factory) -> Path:
    """Fails at step 5, goes on from step 2, fails at step 4, goes on from step 2 again, to the end."""
    place = tmp_path_factory.mktemp("fit")
    more = [*TRACKED, "train.steps=6", "train.checkpoint_every=768", "train.keep=9", "train.evaluate_every=1152"]
    folder = place / "run"
    code = {"farspan": "0.1.0", "commit": "c0ffee", "modified": False, "remote": "https://me:secret@host/x.git"}
    first = order(place, folder, *more, code=code)
    again = order(place, folder, *more, code=code, resume=str(folder / "checkpoints" / "step-2"))
    tries = [(first, gradient_is_not_finite, 5), (again, data_is_lost, 4), (again, None, 0)]
    (ends,) = run(1, attempts, *tries)
    assert ends == ["FloatingPointError", "OSError", ""]
    return folder


@pytest.mark.slow
def test_steps_that_are_trained_again_are_in_every_record_with_their_attempt(broken_twice: Path) -> None:
    expected = [(s, 1) for s in (1, 2, 3, 4)] + [(3, 2)] + [(s, 3) for s in (3, 4, 5, 6)]
    written = records(broken_twice / "metrics.jsonl", every_attempt=True)
    assert [(r["step"], r["attempt"]) for r in written] == expected
    wandb = [step for path in offline_files(broken_twice) for step in history(path)]
    assert [(s["step"], s["attempt"]) for s in wandb] == expected
    assert [s["_step"] for s in wandb] == list(range(len(expected)))
    tensorboard = [values(e) for path in files(broken_twice) for e in events(path)[1:]]
    assert [(v["step"], v["attempt"]) for v in tensorboard] == expected

    counts = records(broken_twice / "metrics.jsonl")
    assert [(r["step"], r["attempt"]) for r in counts] == [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3), (6, 3)]
    for again in written[2:5]:  # and they are the same steps
        assert again["loss"] == counts[again["step"] - 1]["loss"]


def test_a_failed_attempt_is_marked_and_told(broken_twice: Path) -> None:
    told = [[(a.title, a.text, a.level) for a in of_kind(path, "alert")] for path in offline_files(broken_twice)]
    first = ("not finite", "FloatingPointError: grad_norm is nan at step 5 (attempt 1, step 5)", "ERROR")
    second = ("failed", "OSError: the disk is gone (attempt 2, step 3)", "ERROR")
    goes_on = [("goes on", f"attempt {attempt} goes on from step 2", "INFO") for attempt in (2, 3)]
    assert told == [[first], [goes_on[0], second], [goes_on[1]]]
    assert [of_kind(path, "exit")[0].exit_code for path in offline_files(broken_twice)] == [1, 1, 0]
    assert [summary(path).get("error") for path in offline_files(broken_twice)] == [first[1], second[1], None]


def test_configuration_code_and_checkpoints_are_told(broken_twice: Path) -> None:
    for path in offline_files(broken_twice):
        told = config(path)
        assert told["train"]["steps"] == 6 and told["model"]["dim"] == 32
        assert told["code"]["commit"] == "c0ffee" and told["code"]["remote"] == "https://host/x.git"
        assert of_kind(path, "run")[0].git.commit == "c0ffee"
        assert b"secret" not in path.read_bytes()
    aliases = [[set(a.aliases) - {"latest"} for a in of_kind(p, "artifact")] for p in offline_files(broken_twice)]
    assert aliases == [[{"step-2"}, {"step-4"}], [], [{"step-4"}, {"step-6"}]]


def test_an_evaluation_says_how_long_documents_were(broken_twice: Path) -> None:
    counts = records(broken_twice / "metrics.jsonl")
    assert ["documents" in r for r in counts] == ["heldout_loss" in r for r in counts]
    assert [r["step"] for r in counts if "documents" in r] == [3, 6]
    for limits in (r["documents"] for r in counts if "documents" in r):
        powers = [limit for limit, _ in limits]
        assert all(power & (power - 1) == 0 for power in powers) and powers[-1] <= 128
        assert [b // a for a, b in zip(powers, powers[1:], strict=False)] == [2] * (len(powers) - 1)
        assert limits[0][1] > 0 and limits[-1][1] > 0
        assert sum(n * limit for limit, n in limits) >= 384 > sum(n * limit // 2 for limit, n in limits)


def test_the_lengths_of_documents_fall_into_powers_of_two() -> None:
    import numpy as np

    from train.evaluation.heldout import document_lengths

    starts = np.zeros(16, dtype=bool)
    starts[[0, 1, 3, 6, 10]] = True  # 1, 2, 3, 4, 6
    assert document_lengths([starts]) == [[1, 1], [2, 1], [4, 2], [8, 1]]
    one = np.zeros(600, dtype=bool)
    one[0] = True
    assert document_lengths([one, one]) == [[1024, 2]]
    assert document_lengths([one[:512]]) == [[512, 1]]


def numbers(*jobs: dict[str, Any]) -> list[int]:
    return [build(job).state.attempt for job in jobs]


def test_every_rank_has_the_same_attempt_and_none_comes_twice(run, tmp_path: Path) -> None:
    jobs = [order(tmp_path, tmp_path / "new"), order(tmp_path, tmp_path / "new", attempt=7)]
    died = order(tmp_path, tmp_path / "died")  # twice, before a first checkpoint
    log = JsonlWriter(tmp_path / "died" / "metrics.jsonl")
    for attempt in (1, 2):
        log.log({"step": 1, "tokens": 1, "attempt": attempt})
    jobs += [died, {**died, "attempt": 3}, {**died, "attempt": 9}, {**died, "attempt": 1}]
    assert run(2, numbers, *jobs) == [[1, 7, 3, 3, 9, 3]] * 2


def continued(first: dict[str, Any], second: dict[str, Any]) -> None:
    for job in (first, second):
        build(job).fit()


@pytest.mark.slow
def test_a_continued_run_knows_its_parent_through_restarts(run, broken_twice: Path, tmp_path: Path) -> None:
    child = tmp_path / "child"
    more = [*TRACKED, "train.checkpoint_every=384"]
    first = order(tmp_path, child, *more, "train.steps=1", init_from=str(broken_twice / "checkpoints" / "step-6"))
    second = order(tmp_path, child, *more, "train.steps=2", resume=str(child / "checkpoints" / "step-1"))
    run(1, continued, first, second)
    for path in offline_files(child):
        lineage = config(path)["lineage"]
        assert (lineage["run"], lineage["checkpoint"], lineage["step"]) == ("run", "step-6", 6)
        assert lineage["tokens"] == 6 * 384
        assert lineage["wandb_id"] == (broken_twice / "wandb-id").read_text().strip()
        assert of_kind(path, "run")[0].job_type == "continue"


def test_tracking_takes_less_than_a_hundredth_of_the_training_thread(run, tmp_path: Path) -> None:
    """The default model on a short step, which makes the share larger; by the thread's own CPU clock."""
    small = [o for o in overrides(tmp_path) if not o.startswith(("model", "data.max_length", "train.", "tracking"))]
    more = ["data.max_length=1024", "train.batch_tokens=1024", "train.steps=4", "train.checkpoint_every=2048"]
    more += ["train.evaluate_every=2048", "train.evaluate_tokens=1024"]
    cost: Cost = run(1, measure, fully_tracked(tmp_path / "run", [*small, *more]), timeout=300)[0]
    assert cost.calls == 4 + 2 + 1  # records, checkpoints, the end
    assert 0 < cost.tracker < 0.01 * cost.thread, cost
