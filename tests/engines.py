"""Engines against FSDP: losses of 50 steps in fp32 at 1, 2 and 4 ranks, and checkpoints that change hands.

    python -m tests.engines [STEPS]

Every engine that is installed trains one small hybrid on the same batches, with its sequences whole and shared by two
ranks, in several micro-steps and in one. A line says by how much a loss, on any rank at any step, differs from FSDP's
on as many ranks, relative to it. Halfway a checkpoint is saved; another engine, on another number of ranks, goes on
from it, and its losses are held against those of the run that went on by itself. The code is 1 where a line exceeds
the tolerance.
"""

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.jobs import order
from tests.world import run_world
from train.build import build
from train.checkpoints.hook import Checkpoints

TOLERANCE = 1e-5  # of losses, in fp32
STEPS = 50
MORE = ["precision=fp32", "model.blocks.gla.ffn.top_k=4", "train.tokens=100000"]  # every expert: a choice may flip


class Layout(NamedTuple):
    """Some ranks, those of one sequence, and the keys that say so."""

    ranks: int
    sequence: int
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.sequence} a sequence{''.join(f', {key}' for key in self.keys)}"


LAYOUTS = (
    Layout(1, 1),
    Layout(2, 1, ("scheduler.tokens_per_rank=96",)),
    Layout(2, 2),
    Layout(4, 1),
    Layout(4, 2, ("scheduler.tokens_per_rank=50",)),
)
ENGINES: dict[str, tuple[str, ...]] = {
    "deepspeed, ZeRO-1": ("engine=deepspeed",),
    "deepspeed, ZeRO-2": ("engine=deepspeed", "engine.zero=2"),
    "deepspeed, ZeRO-3": ("engine=deepspeed", "engine.zero=3"),
    "deepspeed, ZeRO-2, offload": ("engine=deepspeed", "engine.zero=2", "engine.offload=optimizer"),
    "deepspeed, ZeRO-3, offload": ("engine=deepspeed", "engine.zero=3", "engine.offload=weights"),
    "deepspeed, ZeRO-1, CPU Adam": ("engine=deepspeed", "engine.offload=optimizer", "engine.cpu_adam=true"),
}


def losses(job: dict[str, Any], steps: int, save: int | None = None) -> list[float]:
    """Losses of the steps up to number `steps`, on this rank; a checkpoint is saved after step `save`."""
    trainer, values = build(job), []
    while trainer.state.step < steps:
        values.append(trainer.step()[0]["loss"])
        if trainer.state.step == save:
            trainer.hooks.of(Checkpoints).save()
    return values


class Run(NamedTuple):
    """A run of the small job, in a folder of its own by `name`. resume: a checkpoint that it goes on from; others save
    one halfway. entry: makes its losses of what `losses` takes."""

    name: str
    keys: tuple[str, ...] = ()
    resume: Path | None = None
    entry: Callable[..., list[float]] = losses


class Runs:
    """Runs of the small job, below `folder`, of so many steps."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps

    def run(self, layout: Layout, *runs: Run) -> dict[str, list[list[float]]]:
        """By name of a run, the losses by rank of its steps. All runs of a layout share one world, for starts are
        dear."""
        keys = (f"cluster.workers={layout.ranks}", f"parallel.sequence={layout.sequence}", *layout.keys, *MORE)
        jobs = {
            each.name: (
                order(
                    self.folder,
                    self.folder / each.name,
                    *keys,
                    *each.keys,
                    **({} if each.resume is None else {"resume": str(each.resume)}),
                ),
                each.entry,
            )
            for each in runs
        }
        ranks = run_world(layout.ranks, _each, jobs, self.steps, timeout=3600)
        return {name: [rank[name] for rank in ranks] for name in jobs}

    def checkpoint(self, name: str) -> Path:
        """The one that a run saved halfway."""
        return self.folder / name / "checkpoints" / f"step-{self.steps // 2}"


def _each(jobs: dict[str, tuple[dict[str, Any], Callable[..., list[float]]]], steps: int) -> dict[str, list[float]]:
    return {name: entry(job, steps, None if "resume" in job else steps // 2) for name, (job, entry) in jobs.items()}


def apart(got: list[list[float]], want: list[float]) -> float:
    """The largest relative difference of a loss, on any rank at any step."""
    assert all(len(rank) == len(want) for rank in got)
    return max(abs(a - b) / abs(b) for rank in got for a, b in zip(rank, want, strict=True))


def compare(
    runs: Runs, engines: dict[str, tuple[str, ...]], layouts: tuple[Layout, ...] = LAYOUTS
) -> Iterator[tuple[str, float]]:
    """Yields what was compared, and by how much it differs. The checkpoints of the last layout change hands."""
    alone = runs.run(Layout(1, 1), Run("alone"))["alone"][0]
    for n, layout in enumerate(layouts):
        plain = f"fsdp-{n}"
        each = {engine: f"{i}-{n}" for i, engine in enumerate(engines)}
        losses = runs.run(layout, Run(plain), *(Run(each[engine], keys) for engine, keys in engines.items()))
        yield f"fsdp, {layout}, against one rank", apart(losses[plain], alone)
        for engine, name in each.items():
            yield f"{engine}, {layout}", apart(losses[name], losses[plain][0])
    small = layouts[min(1, len(layouts) - 1)]
    going_on = []
    for i, keys in enumerate(engines.values()):
        going_on.append(Run(f"from-{i}", resume=runs.checkpoint(f"{i}-{n}")))
        going_on.append(Run(f"on-{i}", keys, resume=runs.checkpoint(f"fsdp-{n}")))
    losses = runs.run(small, *going_on)
    for i, engine in enumerate(engines):
        half = alone[runs.steps // 2 :]
        yield f"fsdp on {small} from {engine} on {layout}", apart(losses[f"from-{i}"], half)
        yield f"{engine} on {small} from fsdp on {layout}", apart(losses[f"on-{i}"], half)


def main(steps: int) -> int:
    chosen = {name: keys for name, keys in ENGINES.items() if importlib.util.find_spec(name.partition(",")[0])}
    if not chosen:
        print("no engine but fsdp is installed")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        for what, error in compare(Runs(Path(folder), steps), chosen):
            bad += error > TOLERANCE
            print(f"{error:9.1e}  {what}{'  WRONG' if error > TOLERANCE else ''}", flush=True)
        print(f"{time.monotonic() - began:.0f} s, {steps} steps, tolerance {TOLERANCE:g}: {bad or 'none'} wrong")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS))
