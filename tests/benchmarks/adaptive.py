"""Adaptive groups for real: four ranks on this machine, a hybrid model, lengths of Wikipedia, measured and simulated.

    python -m tests.benchmarks.adaptive [megabits a second …]      with rates: Linux, as root, in network namespaces

The costs are measured first, as `farspan plan cost.profile=true` does, on the same ranks and wires. Every batch then
runs forward and backward by each scheduler's plan. A micro-step takes its slowest rank's processor seconds, of the
thread that computes, and its messages: bytes and calls as the rank counted them, at the measured wire. Wall time would
be that of four processes on fewer cores. The simulator knows of none of it but the costs.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.pack import Packed
from launch.config.compose import composed
from parallel.collectives import LEDGER
from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.packing import Packing
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.adaptive.rivals import LongestFirst
from parallel.schedule.adaptive.scheduler import Adaptive
from parallel.schedule.adaptive.simulate import seconds
from parallel.schedule.plan import Plan
from tests.benchmarks.hosts import namespaces
from tests.jobs import overrides
from tests.world import run_world
from train import measure_costs
from train.build import build
from train.execute import Executor
from train.step_costs import costs_of

RANKS, BATCHES, SEQUENCES, SCALE, LONGEST = 4, 2, 48, 24, 2048
REPEATS = 5  # of a step, of which the least counts, as of a layer when costs are measured
PER_RANK = 640  # tokens that a rank holds
LENGTHS = Path(__file__).parents[1] / "parallel" / "wikipedia_lengths.txt"
MODEL = [
    "model.layers=4",
    "model.pattern=[gdn,gdn,gdn,attn]",
    "model.dim=64",
    "model.blocks.gdn.mixer.heads=2",
    "data.max_length=2048",
    "train.batch_tokens=2048",
    "scheduler.tokens_per_rank=null",
    "cluster.workers=4",
    "cost.seconds=8",
]

Row = tuple[str, int, float, float, float]  # scheduler, batch, seconds of computing, of messages, simulated


@dataclass(frozen=True)
class _Timed(Executor):
    """Notes of each micro-step this rank's seconds of computing, and its bytes and calls by axis."""

    taken: list[Any] = field(default_factory=list)
    waited: Callable[[], float] = float  # processor seconds in waits for others, which their messages stand for

    def _run(self, *arguments: Any) -> Iterator[Any]:
        LEDGER.take()
        began = time.thread_time() - self.waited()
        yield from super()._run(*arguments)
        took = time.thread_time() - self.waited() - began
        found = LEDGER.take()
        ways = {axis: [0.0, 0.0] for axis in ("sequence", "world")}
        for i, counts in enumerate(found):
            for entry, number in counts.items():
                ways["sequence" if entry.axis == "sequence" else "world"][i] += number
        self.taken.append((took, ways))


class _Waits:
    """Processor seconds of the thread that computes, in waits for others."""

    def __init__(self) -> None:
        self.seconds, self._began = 0.0, 0.0

    def __call__(self) -> "_Waits":
        return self

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._began = time.thread_time()

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self.seconds += time.thread_time() - self._began


def batches() -> list[list[int]]:
    """Lengths of some batches, each with a long document among short ones."""
    found = np.array(LENGTHS.read_text().split(), dtype=np.int64) // SCALE
    found = found.clip(16, LONGEST)
    several = [found[i : i + SEQUENCES].tolist() for i in range(0, len(found) - SEQUENCES, SEQUENCES)]
    return sorted(several, key=max, reverse=True)[: 4 * BATCHES : 4]


def schedulers(costs: Costs) -> dict[str, Any]:
    found = {"adaptive": lambda lengths: Planner(costs, quantum=1).plan(lengths).packing}
    found["one size, longest first"] = LongestFirst(costs).pack
    return found | {"static 4": LongestFirst(costs, 4).pack}


def part(order: dict[str, Any]) -> list[Row]:
    """The work of a rank."""
    config = order["config"]
    trainer = build(order)
    measure_costs.run({"config": config, "device": "cpu", "path": config.cost.path})
    dist.barrier()
    with torch.device("meta"):
        model = config.model.build()
    model.compute = torch.float32
    scheduler = Adaptive(tokens_per_rank=PER_RANK, quantum=1)
    costs, line = costs_of(config, scheduler, model, device="cpu", mesh=trainer.groups.mesh, threads=1)
    if trainer.groups.rank == 0:
        print(line)
    old = trainer.executor
    waits = _Waits()
    trainer.groups.waiting = waits
    fields = {name: getattr(old, name) for name in Executor.__dataclass_fields__}
    executor = _Timed(**fields, waited=lambda: waits.seconds)
    rows: list[Row] = []
    for b, lengths in enumerate(batches()):
        batch = [_sequence(n, (b, i)) for i, n in enumerate(lengths)]
        for name, pack in schedulers(costs).items():
            packing: Packing = pack(lengths)
            plan = packing.plan(b, lengths, RANKS)
            if not rows:
                executor.train(plan, batch)  # warms up
            tries = [_step(trainer, executor, costs, plan, batch) for _ in range(REPEATS)]
            computing, messages = min(tries, key=sum)
            rows.append((name, b, computing, messages, seconds(costs, packing, lengths)))
    return rows


def _step(trainer: Any, executor: _Timed, costs: Costs, plan: Plan, batch: list[Packed]) -> tuple[float, float]:
    """Seconds of computing and of messages of a step, each micro-step as long as its slowest rank."""
    executor.taken.clear()
    executor.train(plan, batch)
    trainer.optimizer.zero_grad()
    own = [
        (took, ways, len(micro.group_of(trainer.groups.rank).ranks))
        for (took, ways), micro in zip(executor.taken, plan.micro_steps, strict=True)
    ]
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, own)
    slowest = [
        max(((took, _messages(costs, ways, size)) for took, ways, size in micro), key=sum)
        for micro in zip(*everyone, strict=True)
    ]
    return sum(took for took, _ in slowest), sum(sent for _, sent in slowest)


def _messages(costs: Costs, ways: dict[str, list[float]], size: int) -> float:
    """Seconds of a rank's messages at the measured wires."""
    total = 0.0
    for axis, ranks in (("sequence", size), ("world", RANKS)):
        wire = costs.cluster.wire(ranks)
        bytes_, calls = ways[axis]
        total += bytes_ / wire.bandwidth + (calls * wire.latency if axis == "sequence" else 0.0)
    return total


def _sequence(length: int, seed: tuple[int, int]) -> Packed:
    tokens = np.random.default_rng(seed).integers(0, 256, length)
    return Packed(tokens=tokens, targets=np.roll(tokens, -1), starts=np.arange(length) == 0)


def report(rows: list[Row], title: str) -> list[str]:
    names = list(dict.fromkeys(name for name, *_ in rows))
    total = {name: np.array([row[2:] for row in rows if row[0] == name]).sum(0) for name in names}
    base = total["adaptive"]
    lines = [f"{title}: {BATCHES} batches of {SEQUENCES} documents, at most {LONGEST} tokens, on {RANKS} ranks"]
    heads = f"{'computing':>10}{'messages':>10}{'together':>10}{'simulated':>11}{'off by':>8}"
    lines.append(f"{'':<26}{heads}  over ours, simulated")
    for name, (computing, messages, simulated) in total.items():
        both, ours = computing + messages, base[0] + base[1]
        lines.append(
            f"{name:<26}{computing:>9.2f}s{messages:>9.2f}s{both:>9.2f}s{simulated:>10.2f}s{simulated / both - 1:>8.1%}"
            f"  {both / ours:.3f}, {simulated / base[2]:.3f}"
        )
    return lines


def _in_namespace(space: str, rank: int, order: dict[str, Any], report_: Any) -> None:
    """The work of a rank, in its namespace."""
    import ctypes
    from datetime import timedelta

    with open(f"/var/run/netns/{space}") as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns {space}")
    os.environ["GLOO_SOCKET_IFNAME"] = "wire"
    torch.set_num_threads(1)
    store = dist.TCPStore("10.99.0.1", 29400, RANKS, rank == 0, timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=300))
    rows = part(order)
    if rank == 0:
        report_.put(rows)
    dist.barrier()


def measured(rate: int | None, folder: Path) -> list[Row]:
    """All rows over links of that rate in megabits a second; None for this machine's loopback."""
    config = composed(overrides(folder, *MODEL, f"cost.path={folder / 'costs.json'}"))
    order = {"config": config, "run_dir": str(folder), "device": "cpu"}
    if rate is None:
        return run_world(RANKS, part, order, timeout=900)[0]
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with namespaces(rate) as spaces:
        queue = context.SimpleQueue()
        workers = [context.Process(target=_in_namespace, args=(s, r, order, queue)) for r, s in enumerate(spaces)]
        try:
            for worker in workers:
                worker.start()
            while queue.empty():
                if any(worker.exitcode for worker in workers):
                    raise RuntimeError("a rank has failed")
                time.sleep(0.2)
            return queue.get()
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def main(rates: list[int]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces go on the way out
    for rate in rates or [None]:  # type: ignore[list-item]
        with tempfile.TemporaryDirectory() as place:
            rows = measured(rate, Path(place))
        print("\n".join(report(rows, "loopback" if rate is None else f"{rate} Mbit/s")))


if __name__ == "__main__":
    main([int(rate) for rate in sys.argv[1:]])
