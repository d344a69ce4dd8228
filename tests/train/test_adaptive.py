"""Training with adaptive groups: the losses of one process, plans that differ from step to step, a resume that is
bitwise, a slow rank that gets less work."""

import json
from typing import Any

import numpy as np
import pytest

from tests.jobs import HYBRID, order
from train.build import build
from train.checkpoints.hook import Checkpoints

pytestmark = pytest.mark.dist

# Windows hold whole documents of one byte to some hundred; of the last, padding is left out.
JOB = [
    *HYBRID,
    "precision=fp64",
    "train.steps=12",
    "data.packing=best_fit",
    "data.max_length=192",
    "train.batch_tokens=768",
]
ADAPTIVE = ["scheduler=adaptive", "scheduler.tokens_per_rank=96", "scheduler.quantum=1", "scheduler.stragglers=false"]
STEPS = 4


def train(job: dict[str, Any], steps: int, save_at: int | None = None) -> Any:
    """Of each step its loss and gradient norm, and its groups; where the run was saved."""
    trainer, found, saved = build(job), [], None
    plans: list[Any] = []
    honest = trainer.executor.train
    object.__setattr__(trainer.executor, "train", lambda plan, batch: plans.append(plan) or honest(plan, batch))
    for step in range(1, steps + 1):
        record, _ = trainer.step()
        groups = [[(g.ranks, g.sequences) for g in micro.groups] for micro in plans[-1].micro_steps]
        found.append((record["loss"], record["grad_norm"], record["tokens"], groups))
        if step == save_at:
            saved = str(trainer.hooks.of(Checkpoints).save())
    return found, saved


def slowed(job: dict[str, Any], steps: int, rank: int, times: float) -> list[float]:
    """Of each step this rank's tokens. A rank's clock counts them, and that of one rank runs faster from step 3 on."""
    trainer = build(job)
    seen = {"tokens": 0.0}

    def note(module: Any, inputs: Any) -> None:
        seen["tokens"] += inputs[0].shape[0] * inputs[0].shape[1]

    next(iter(trainer.model.layers.values())).register_forward_pre_hook(note)
    found: list[float] = []

    def clock() -> float:
        found.append(seen["tokens"])
        seen["tokens"] = 0.0
        return found[-1] * (times if trainer.groups.rank == rank and len(found) > 2 else 1.0)

    assert trainer.computing is not None
    trainer.computing = clock
    for _ in range(steps):
        trainer.step()
    return found


def numbers(steps: Any) -> list[Any]:
    return [row[:3] for row in steps]


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory) -> Any:
    """One process, the static scheduler, packed sequences."""
    folder = tmp_path_factory.mktemp("alone")
    return run(1, train, order(folder, folder / "run", *JOB, "cluster.workers=1"), STEPS)[0][0]


@pytest.fixture(scope="module")
def adaptive(run, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("adaptive")
    job = order(folder, folder / "run", *JOB, *ADAPTIVE, "cluster.workers=2")
    return folder, run(2, train, job, STEPS, save_at=STEPS // 2)


@pytest.mark.slow
def test_an_adaptive_run_has_the_losses_of_one_process(alone: Any, adaptive: Any) -> None:
    _, ranks = adaptive
    for steps, _ in ranks:
        np.testing.assert_allclose(numbers(steps), numbers(alone), rtol=1e-10)
    sizes = [{len(ranks) for micro in groups for ranks, _ in micro} for *_, groups in ranks[0][0]]
    assert set.union(*sizes) >= {1, 2}, "groups of several sizes"
    assert len({str(groups) for *_, groups in ranks[0][0]}) > STEPS // 2, "that follow the lengths"


@pytest.mark.slow
def test_spans_in_time_in_adaptive_groups_have_those_losses_too(run, tmp_path: Any, alone: Any) -> None:
    more = ["train.span_tokens=20", "cluster.workers=2"]
    steps, _ = run(2, train, order(tmp_path, tmp_path / "run", *JOB, *ADAPTIVE, *more), 2)[0]
    np.testing.assert_allclose(numbers(steps), numbers(alone[:2]), rtol=1e-10)


def test_resuming_replays_the_logged_plans_and_is_bitwise_uninterrupted(run, adaptive: Any) -> None:
    folder, ranks = adaptive
    whole, path = ranks[0]
    log = folder / "run" / "plans" / "plans.jsonl"
    lines = log.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # Another plan than the planner would make: all of step 4 in micro-steps of one group each.
    last = rows[-1]
    last["micro_steps"] = [[group] for micro in last["micro_steps"] for group in micro]
    log.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    job = order(folder, folder / "run", *JOB, *ADAPTIVE, "cluster.workers=2", resume=path)
    rest, _ = run(2, train, job, STEPS // 2)[0]
    assert rest[0] == whole[STEPS // 2]
    replayed = [[group for group in micro if group[1]] for micro in rest[1][-1]]
    assert max(map(len, replayed)) == 1 < len(replayed)
    np.testing.assert_allclose(numbers(rest), numbers(whole[STEPS // 2 :]), rtol=1e-10)
    assert len(log.read_text().splitlines()) == STEPS, "no plan is logged twice"


def test_a_slow_rank_gets_less_work_and_the_log_says_so(run, tmp_path: Any) -> None:
    """At least half of what a rank of half the speed costs is won back; the clock is one of tokens, so that a busy
    machine changes nothing."""
    more = ["scheduler=adaptive", "scheduler.quantum=1", "cluster.workers=2", "model.layers=1", "train.steps=20"]
    job = order(tmp_path, tmp_path / "run", *JOB, *more)
    fast, slow = run(2, slowed, job, 10, 1, 2.0)
    before = np.mean([max(a, b) for a, b in zip(fast[:2], slow[:2], strict=True)])
    lost = np.mean([max(a, 2 * b) for a, b in zip(fast[2:6], slow[2:6], strict=True)])
    after = np.mean([max(a, 2 * b) for a, b in zip(fast[-4:], slow[-4:], strict=True)])
    best = before * 4 / 3  # of speeds 1 and 1/2
    assert lost - after > 0.5 * (lost - best) > 0
    (line,) = [each for each in (tmp_path / "run" / "log.txt").read_text().splitlines() if "speeds of ranks" in each]
    assert "step 6: speeds of ranks changed: rank 1 at 0." in line or "step 7:" in line
