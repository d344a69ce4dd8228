"""The GPU path on one GPU: built, held to references, and timed, within eight minutes; in 60 s its most telling third.

    python -m tests.benchmarks.gpu [--seconds 480] [--out gpu_report] [--device cuda] [--tiny] [part ...]

The parts are those of PARTS, the most telling first; one that needs more seconds than are left is left out, and the
table says so. A check holds numbers of the device to a reference on the CPU in fp64, written here or in the tests from
the papers; one that fails makes the exit code 1. A figure is a time or a rate, beside its aim where it has one; it
fails nothing. A part that raises is one row, and the next begins. OUT/gpu.json has all rows after each part,
OUT/gpu.md the table at the end. It needs neither Ray nor wandb, one GPU, and torch 2.11 or newer.

`--device cpu --tiny` runs every line that is not CUDA's own on a machine without a GPU, at sizes that say nothing.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.cli import main as farspan
from launch.config.compose import composed
from models.accounting import account
from parallel.mesh import Groups, Meshes
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Plan
from tests.benchmarks import plain_torch
from tests.benchmarks.fla_peer import Layers, PeerSteps, Shape, of_fla, stand_ins
from tests.benchmarks.gpu_checks import GIB, Bench, Row, kernels, machine, models, recipes
from tests.parity import Sample
from train.execute import Executor
from train.guards.step_guard import Guard, apply
from train.metrics.timing import PhaseTimes
from train.optim.clip import clip
from train.placed_model import place_model
from train.run_config import ObjectConfig, RunConfig

RECIPE_STEPS = ("fp8_rowwise", "fp8_tensorwise")


class Steps:
    """Training steps of a configuration as a run takes them: FSDP2, executor, clipping, guard, optimizer."""

    def __init__(self, config: RunConfig, device: str):
        where = torch.device(device, 0) if device == "cuda" else torch.device(device)
        order = {"config": config, "device": device}
        placed = place_model(order, Meshes(Mesh(), where), PhaseTimes(), lambda line: None)
        self.model, self.optimizer, self.groups, self.account = placed.model, placed.optimizer, Groups(Mesh()), None
        recurrence, attention = config.parallel.transport.build()
        self.executor = Executor(self.model, self.groups, where, recurrence, attention, config.train.balance_weight)
        self.guard = Guard(config.train.guard, self.groups.all_comm, where)
        self.scheduler = config.scheduler.build()

    def __call__(self, batch: list[Sample]) -> float:
        """One step. Returns the loss a target."""
        plan: Plan = self.scheduler.plan(1, [len(s.tokens) for s in batch], data=1, sequence=1)
        tally = self.executor.train(plan, batch)
        size = clip(self.model, self.groups.layers_comm, largest=1.0, each=None, value=None)
        targets = sum(int((s.targets != -100).sum()) for s in batch)
        apply(self.optimizer, self.guard.decide(tally.cross_entropy, targets, size))
        self.optimizer.zero_grad()
        return tally.cross_entropy.item() / targets


def documents(length: int) -> Sample:
    """A packed sequence of documents of four lengths."""
    parts = (length // 2, length // 4, length // 8)
    return Sample((*parts, length - sum(parts)))


def configured(bench: Bench, *overrides: str, mixer: dict[str, Any] | None = None) -> RunConfig:
    """Llama's 1B by name, or with `mixer` in three layers of four; tiny: two narrow layers."""
    tiny = ["model.dim=64", "model.layers=2", "model.vocabulary=512", "model.blocks.llama.mixer.heads=4"]
    tiny += ["model.blocks.llama.mixer.kv_heads=2", "model.blocks.llama.ffn.hidden=96"]
    precision = "precision=fp32" if bench.device == "cpu" else "precision=bf16"
    config = composed(["model=llama_1b", precision, "train.mfu=false", *(tiny if bench.tiny else []), *overrides])
    if mixer is None:
        return config
    values: dict[str, Any] = json.loads(json.dumps(dict(config.model.values)))
    linear = {**values["blocks"]["llama"], "mixer": {"_partial_": True, **mixer}}
    values |= {
        "blocks": {**values["blocks"], "linear": linear},
        "pattern": ["linear"] * (1 if bench.tiny else 3) + ["llama"],
    }
    return replace(config, model=ObjectConfig(values))


GDN = {"_target_": "models.mixers.GatedDeltaNet"}


def _timed(bench: Bench, name: str, config: RunConfig, lengths: tuple[int, ...], aim: str = "") -> dict[int, float]:
    """Figures of steps of each length: tokens a second, the share of matmuls' rate, the peak of memory. Returns the
    seconds of each."""
    with torch.device("meta"):
        costs = account(config.model.build(), device="cpu")
    steps = Steps(config, bench.device)
    losses, times = [], dict[int, float]()
    for length in lengths:
        if bench.left < 15 and not bench.tiny:
            bench.figure(f"{name}, {length:,} tokens", f"left out: {bench.left:.0f} s are left")
            continue
        if bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        sample = documents(length)
        took = bench.seconds(lambda sample=sample: losses.append(steps([sample])), rounds=3)  # type: ignore[misc]
        times[length] = took
        counts = [length // 2, length // 4, length // 8]
        share = costs.flops([*counts, length - sum(counts)]).model / took / bench.rate
        peak = f", {torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if bench.device == "cuda" else ""
        bench.figure(f"{name}, {length:,} tokens", f"{length / took:,.0f} tokens/s, {share:.0%} of matmuls{peak}", aim)
    if losses:
        bench.check(f"{name}, last loss over the first", losses[-1] / losses[0], 1.5)
    return times


def dense(bench: Bench) -> None:
    """Times a step of a dense 1B at 8k, beside a plain loop of the same shapes."""
    length = 64 if bench.tiny else 8192
    _timed(bench, "Llama 1B", configured(bench), (length,), "45% of matmuls")
    shape = {"dim": 64, "layers": 4} if bench.tiny else None
    if shape is None and bench.left > 30:
        _plain_loop(bench, length)


def _plain_loop(bench: Bench, length: int) -> None:
    """The loop that one writes with torch alone, on one sequence without documents."""
    shape: dict[str, Any] = {"dim": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "hidden": 8192}
    model = plain_torch.PlainLlama(128_256, **shape).to(bench.device)
    tokens = torch.randint(0, 128_256, (1, length + 1), device=bench.device)

    def loss() -> Tensor:
        with torch.device(bench.device), torch.autocast(bench.device, torch.bfloat16):
            result: Tensor = model(tokens[:, :-1], tokens[:, 1:])
        return result

    took = bench.seconds(plain_torch.training_step(model, loss), rounds=3)
    bench.figure(f"plain loop of Llama 1B, {length:,} tokens", f"{length / took:,.0f} tokens/s")


def hybrid(bench: Bench) -> None:
    """Times a step of a 1B hybrid, three layers of Gated DeltaNet to one of attention."""
    lengths = (64,) if bench.tiny else (8192, 32768, 131072)
    more = ["engine.recompute=selective", "train.loss_chunk=4096"]
    config = configured(bench, *more, mixer={**GDN, "heads": 4 if bench.tiny else 16})
    bench.took = _timed(bench, "hybrid 1B", config, lengths)


def peer(bench: Bench) -> None:
    """Times the same hybrid of flash-linear-attention's layers under plain FSDP2, and puts farspan's rate over its."""
    made = _peer_layers(bench)
    if made is None:
        return
    for length in (64,) if bench.tiny else (8192, 32768, 131072):
        if bench.left < 15 and not bench.tiny:
            bench.figure(f"{made.name}, {length:,} tokens", f"left out: {bench.left:.0f} s are left")
            continue
        for again in (False, True):
            try:
                steps = PeerSteps(peer_shape(bench), made, bench.device, again=again)
                took = bench.seconds(lambda steps=steps, n=length: steps([documents(n)]), rounds=3)  # type: ignore[misc]
            except torch.OutOfMemoryError:
                steps = None
                continue
            how = "all layers computed again" if again else "nothing computed again"
            over = f", farspan over it {took / bench.took[length]:.2f}" if length in bench.took else ""
            name = f"{made.name}, {length:,} tokens"
            bench.figure(name, f"{length / took:,.0f} tokens/s, {how}{over}", "1.0" if over else "")
            break
        else:
            bench.figure(f"{made.name}, {length:,} tokens", "out of memory")


def peer_shape(bench: Bench) -> Shape:
    """The sizes of `configured`'s hybrid."""
    if bench.tiny:
        return Shape(512, 64, 2, 4, 2, 4, 96, ("delta", "attention"))
    return Shape(128_256, 2048, 16, 32, 8, 16, 8192, ("delta", "delta", "delta", "attention"))


def _peer_layers(bench: Bench) -> Layers | None:
    if bench.device == "cpu":
        return stand_ins()
    try:
        return of_fla()
    except ImportError as error:
        bench.figure("flash-linear-attention's layers", f"left out: {error}")
        return None


def recipe_steps(bench: Bench) -> None:
    """Times the 1B at 8k with FP8 in its linear layers."""
    for recipe in RECIPE_STEPS[: 1 if bench.tiny else 2]:
        config = configured(bench, f"precision.recipe={recipe}")
        _timed(bench, f"Llama 1B, {recipe}", config, (64 if bench.tiny else 8192,))


def memory(bench: Bench) -> None:
    """Doubles the sequence of the 1B hybrid until memory or time ends."""
    config = configured(
        bench, "engine.recompute=full", "train.loss_chunk=4096", mixer={**GDN, "heads": 4 if bench.tiny else 16}
    )
    bench.longest = _longest(bench, Steps(config, bench.device))
    bench.figure("longest sequence of the hybrid 1B", _a_gib(bench, bench.longest))


def peer_memory(bench: Bench) -> None:
    """Does the same with the hybrid of flash-linear-attention's layers, each of which is computed again."""
    made = _peer_layers(bench)
    if made is None:
        return
    longest = _longest(bench, PeerSteps(peer_shape(bench), made, bench.device, again=True))
    over = f", farspan over it {bench.longest / longest:.2f}" if bench.longest and longest else ""
    bench.figure(f"longest sequence of {made.name}", _a_gib(bench, longest) + over, "2.0" if over else "")


def _longest(bench: Bench, steps: Callable[[list[Sample]], float]) -> int:
    """The tokens of the longest sequence, doubled from 16,384, of which a step found memory and time."""
    length, longest, took = 64 if bench.tiny else 16384, 0, 0.0
    while bench.left > 3 * took + 5 and length <= (128 if bench.tiny else 1 << 24):
        began = time.perf_counter()
        try:
            steps([documents(length)])
            bench.wait()
        except torch.OutOfMemoryError:
            break
        took, longest, length = time.perf_counter() - began, length, 2 * length
    return longest


def _a_gib(bench: Bench, tokens: int) -> str:
    total = torch.cuda.get_device_properties(0).total_memory / GIB if bench.device == "cuda" else 1.0
    return f"{tokens:,} tokens, {tokens / total:,.0f} a GiB of the device"


def run(bench: Bench) -> None:
    """Takes a run as a user does, in processes of its own: train, save, resume; its exit codes are the check."""
    with tempfile.TemporaryDirectory() as folder:
        more = [f"data.store={folder}/store", f"run.dir={folder}/run", "cluster=none", "cluster.workers=1"]
        more += ["tracking=none", f"cluster.device={bench.device}"]
        if bench.tiny:
            more += ["model.dim=32", "model.layers=2", "train.batch_tokens=256", "data.max_length=128"]
            more += ["data.heldout_tokens=256"]
        codes = (
            farspan(["train", "experiment=smoke", "train.steps=2", *more]),
            farspan(["train", f"resume={folder}/run", "train.steps=3", f"cluster.device={bench.device}"]),
        )
    bench.check("farspan train, then resume: exit codes", float(sum(codes)), 0.0)


PARTS: dict[str, tuple[Callable[[Bench], None], int]] = {  # the most telling first, and the seconds that each needs
    "machine": (machine, 2),
    "kernels": (kernels, 10),
    "models": (models, 15),
    "recipes": (recipes, 10),
    "dense": (dense, 40),
    "hybrid": (hybrid, 60),
    "peer": (peer, 45),
    "recipe_steps": (recipe_steps, 60),
    "memory": (memory, 40),
    "peer_memory": (peer_memory, 30),
    "run": (run, 60),
}


@contextmanager
def alone(device: str) -> Iterator[None]:
    """A world of one rank, where there is none."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def table(rows: list[Row]) -> str:
    """Markdown."""
    marks = {True: "holds", False: "FAILS", None: ""}
    lines = ["| part | | found | wanted | |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.part} | {r.name} | {r.value} | {r.wanted} | {marks[r.ok]} |" for r in rows)])


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--out", type=Path, default=Path("gpu_report"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("part", nargs="*")
    given = parser.parse_args(arguments)
    if unknown := [part for part in given.part if part not in PARTS]:
        parser.error(f"part={unknown[0]}: must be one of {', '.join(PARTS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: this machine has no CUDA device; accepts cpu, with --tiny")
    bench = Bench(given.device, given.tiny, time.monotonic() + given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    with alone(given.device):
        for name in dict.fromkeys(["machine", *(given.part or PARTS)]):  # first the rate that shares are of
            part, needs = PARTS[name]
            bench.part = name
            if bench.left < (0 if bench.tiny else needs):
                bench.figure("all", f"left out: {max(bench.left, 0):.0f} s are left, it needs {needs}")
                continue
            began = time.monotonic()
            try:
                part(bench)
            except Exception as error:  # one part's fault leaves the others their minutes
                line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                bench.rows.append(Row(name, "raised", line, "", False))
            bench.figure("all", f"{time.monotonic() - began:.1f} s")
            if bench.device == "cuda":
                torch.cuda.empty_cache()
            found = {"arguments": arguments, "rows": [asdict(row) for row in bench.rows]}
            (given.out / "gpu.json").write_text(json.dumps(found, indent=1))
    text = table(bench.rows)
    (given.out / "gpu.md").write_text(text + "\n")
    print(text)
    return int(any(row.ok is False for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
