"""What an optimizer's step costs beside AdamW's by torch's fused kernel: ratios of times, medians of rounds in turn.

    python -m tests.benchmarks.optimizers [rounds] [model override …]

The parameters are those of the default job's model, or of the one asked for. One process first, one thread; then two
ranks over gloo, each with half of every weight, where Muon's matrices travel to their owners and back.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from launch.config.compose import composed
from models.axes import declarations
from models.lm import LM
from parallel.mesh import everyone
from parallel.parallelize import parallelise
from tests.world import run_world
from train.optim.adamw import AdamW
from train.optim.build import build_optimizer
from train.optim.muon import Muon

SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
KINDS: dict[str, Callable[..., Optimizer]] = {
    "AdamW, fused": partial(AdamW, **SETTINGS, fused="torch"),
    "AdamW, foreach": partial(torch.optim.AdamW, **SETTINGS, foreach=True),
    "AdamW, an operator at a time": partial(AdamW, **SETTINGS, fused="none"),
    "Muon": partial(Muon, **SETTINGS),
}
FIRST = next(iter(KINDS))


def sharded(overrides: list[str]) -> tuple[LM, dict]:
    """The model, over the ranks that there are."""
    with torch.device("meta"):
        model = composed(overrides).model.build()
    declared = declarations(model)
    mesh = everyone(torch.device("cpu"))
    parallelise(model, mesh, seed=0, dtype=torch.float32, remat="none", reshard_after_forward=True)
    return model, declared


def times(overrides: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each kind, in turn; the first round warms up and is not counted."""
    model, declared = sharded(overrides)
    kinds = {name: build_optimizer(make, model, declared) for name, make in KINDS.items()}
    for p in model.parameters():
        p.grad = p.detach().clone()
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, each in kinds.items():
            torch.distributed.barrier()
            began = time.perf_counter()
            each.step()
            found[name].append(time.perf_counter() - began)
    return {name: seconds[1:] for name, seconds in found.items()}


def table(found: dict[str, list[float]]) -> str:
    lines = [f"| step | seconds | over {FIRST} (range over rounds) |", "|---|---|---|"]
    for name, seconds in found.items():
        ratios = [a / b for a, b in zip(seconds, found[FIRST], strict=True)]
        middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {statistics.median(seconds):.4f} | {middle} |")
    return "\n".join(lines)


def main(rounds: int = 7, *overrides: str) -> None:
    for world in (1, 2):
        found = run_world(world, times, list(overrides), rounds, timeout=900)[0]
        print(f"{world} {'rank' if world == 1 else 'ranks'}, torch {torch.__version__}\n\n{table(found)}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
