"""How long a checkpoint keeps the thread that trains: ours written beside it, ours waited for, and torch's two.

    python -m tests.benchmarks.saving [ranks=1] [million=30] [rounds=5] [folder=DIR]

A model of so many million parameters under FSDP with AdamW, whose checkpoint is 12 bytes a parameter. The sides take
turns; each round waits until nothing is written any more. `blocked`: seconds of wall time until training may go on, on
the slowest rank. `whole`: until the checkpoint is complete, ours with checksums and a manifest. torch's sides are given
the state dict that `get_state_dict` makes, as ours is, and its seconds count for both.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

from tests.world import run_world
from train.checkpoints import saving
from train.checkpoints.background import Background

AIM = 1.2  # of what dcp.async_save blocks
Timed = tuple[float, float]


def model_of(million: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    width = 512
    layers = max(round(million * 1e6 / (4 * width * width)), 1)
    model = nn.Sequential(
        *(nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4))) for _ in range(layers))
    )
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return model, optimizer


def measured(million: int, rounds: int, folder: str) -> dict[str, list[Timed]]:
    model, optimizer = model_of(million)
    own, place = Background(), Path(folder)

    def ours_beside(step: int) -> Callable[[], Any]:
        def write(held: saving.Contents, group: dist.ProcessGroup) -> Path:
            return saving.write(place, held, {"step": step}, keep=1, group=group)

        own.begin(saving.contents(model, optimizer), write)
        return own.wait

    def ours_waited(step: int) -> Callable[[], Any]:
        saving.save(place, model, optimizer, {"step": step}, keep=1)
        return lambda: None

    def torch_state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    def torch_beside(step: int) -> Callable[[], Any]:
        return dcp.async_save(torch_state(), checkpoint_id=str(place / f"torch-{step}")).result

    def torch_waited(step: int) -> Callable[[], Any]:
        dcp.save(torch_state(), checkpoint_id=str(place / f"torch-{step}"))
        return lambda: None

    sides = {"ours, beside": ours_beside, "torch, async_save": torch_beside}
    sides |= {"ours, waited for": ours_waited, "torch, save": torch_waited}
    times: dict[str, list[Timed]] = {name: [] for name in sides}
    for step in range(rounds + 1):
        for name, side in sides.items():
            dist.barrier()
            began = time.perf_counter()
            wait = side(step)
            blocked = time.perf_counter() - began
            wait()
            found = torch.tensor([blocked, time.perf_counter() - began])
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
            if step:  # the first allocates
                times[name].append((found[0].item(), found[1].item()))
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(place / f"torch-{step}", ignore_errors=True)
    return times


def main(given: list[str]) -> None:
    options = dict(each.split("=", 1) for each in given)
    ranks, million = int(options.get("ranks", 1)), int(options.get("million", 30))
    with tempfile.TemporaryDirectory(dir=options.get("folder")) as folder:
        times = run_world(ranks, measured, million, int(options.get("rounds", 5)), folder, timeout=3600)[0]
    print(f"{million} million parameters, {12 * million} MB, {ranks} rank(s); medians of wall seconds (least to most)")
    medians = {}
    for name, rows in times.items():
        blocked, whole = zip(*rows, strict=True)
        medians[name] = statistics.median(blocked)
        print(
            f"{name:20} blocked {medians[name]:.3f} ({min(blocked):.3f} to {max(blocked):.3f})  "
            f"whole {statistics.median(whole):.3f}"
        )
    ratio = medians["ours, beside"] / medians["torch, async_save"]
    print(f"ours over torch's async_save: {ratio:.2f} (aim, at most {AIM})")


if __name__ == "__main__":
    main(sys.argv[1:])
