"""The layouts that `parallel=auto` would take, against all there are: processor seconds of a step on gloo ranks.

    python -m tests.benchmarks.auto [workers [steps]]

Costs are measured first, as `farspan plan cost.profile=true` does it. Then every layout without recomputation is
trained for some steps, all in one world, one after the other; a layout's seconds are the least of a step on its busiest
rank, the first step left out. docs/planning.md has the results.
"""

import gc
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

MODEL = ["model.dim=128", "model.blocks.gla.ffn.hidden=64", "model.blocks.gla.ffn.shared_hidden=64", "precision=fp32"]
RUN = ["data.max_length=512", "train.batch_tokens=2048", "train.mfu=false", "train.steps=100"]
QUIET = ["train.evaluate_every=null", "train.checkpoint_every=null", "tracking.mode=disabled", "data.heldout=0.2"]


class Swept(NamedTuple):
    """A layout: seconds a step that were foretold, and processor seconds of its busiest rank."""

    layout: str
    foretold: float
    measured: float


def seconds(jobs: list[dict[str, Any]], steps: int) -> list[float]:
    """The least processor seconds of a step of this rank, in each job."""
    from train.build import build

    found = []
    for job in jobs:
        trainer, times = build(job), []
        for _ in range(steps + 1):
            began = time.process_time()
            trainer.step()
            times.append(time.process_time() - began)
        found.append(min(times[1:]))
        del trainer
        gc.collect()
    return found


def swept(workers: int, steps: int, folder: Path) -> list[Swept]:
    """All layouts without recomputation, the fastest by the cost model first."""
    from launch.commands.plan import plan
    from launch.config.compose import composed
    from launch.preflight.auto_layout import search_of
    from tests.jobs import corpus
    from tests.world import run_world

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    own = ["data=text", f"data.path={corpus(folder / 'corpus', 200)}", f"data.store={folder / 'store'}"]
    own += ["cluster=none", f"cluster.workers={workers}", "cluster.threads=1", *MODEL, *RUN, *QUIET]
    assert plan([*own, "cost.profile=true", "cost.seconds=20"]) == 0
    search = search_of(composed([*own, "parallel=auto"]), "cpu")
    ranked = [(step.total, choice) for step, choice in search.ranked if choice.recompute == "none"]
    jobs = []
    for i, (_, choice) in enumerate(ranked):
        run_dir = folder / str(i)
        run_dir.mkdir()
        config = search.settled(choice)
        config = replace(config, parallel=replace(config.parallel, auto=False))
        jobs.append({"config": config, "run_dir": str(run_dir), "device": "cpu"})
    by_rank = run_world(workers, seconds, jobs, steps, timeout=3600)
    return [Swept(str(choice), total, max(each[i] for each in by_rank)) for i, (total, choice) in enumerate(ranked)]


def text(rows: list[Swept], workers: int) -> str:
    best = min(row.measured for row in rows)
    lines = [f"{workers} ranks:", "", "| layout | foretold, s | processor, s | over the best |", "|---|---|---|---|"]
    lines += [f"| {r.layout} | {r.foretold:.3f} | {r.measured:.3f} | {r.measured / best - 1:+.1%} |" for r in rows]
    first = min(row.measured for row in rows[:3])
    return "\n".join([*lines, "", f"The best of the first three takes {first / best - 1:+.1%} over the best of all."])


def main(workers: int = 2, steps: int = 3) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(text(swept(workers, steps, Path(folder)), workers))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
