"""`parallel=auto`: a run's layout, chosen before anything starts, and what there is to say of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.preflight.checked import cores
from launch.preflight.layout import check_layout
from launch.preflight.memory_fit import size_text, too_much
from parallel.schedule.mesh import Mesh
from train.run_config import RunConfig

if TYPE_CHECKING:  # torch is loaded once the configuration has been read
    from models.lm import LM
    from train.layout_search import LayoutSearch, RankedLayout

SHOWN = 10  # layouts of a table


def with_layout(config: RunConfig, device: str, say: Callable[[str], None]) -> RunConfig:
    """The configuration with the layout that is chosen for it. Raises ValueError where none fits."""
    search = search_of(config, device)
    best = fitting(search, 2)
    for line in explained(search, best):
        say(line)
    return search.settled(best[0].choice)


def search_of(config: RunConfig, device: str) -> LayoutSearch:
    """Raises ValueError for what no layout can be chosen for."""
    from train.layout_search import LayoutSearch, machine_of

    length = config.data.get("max_length")
    if not isinstance(length, int):
        raise ValueError(f"data.max_length={length}: must be a number with parallel=auto")
    workers, threads = config.cluster.workers, config.cluster.threads
    threads = threads or max(1, cores() // workers)
    described = config.parallel.machine.device is not None
    memory = math.inf if described else _memory(config, device) / (workers if device == "cpu" else 1)
    device = "cuda" if described else device
    return LayoutSearch(
        config,
        device,
        machine_of(config, device, memory=memory, threads=threads),
        length=length,
        sequences=max(1, max(config.train.ramp.sizes) // length),
        check=_check,
    )


def fitting(search: LayoutSearch, count: int) -> list[RankedLayout]:
    """The fastest layouts that fit. Raises ValueError where none does."""
    if best := search.best(count):
        return best
    least = search.least()
    key = "memory" if search.config.parallel.machine.memory is not None else "device"
    value = getattr(search.config.parallel.machine, key)
    value = "null" if value is None else f"{value:g}" if key == "memory" else value
    why = too_much(search.memory, search.layout(least.choice), least.memory, search.room)
    raise ValueError(
        f"parallel.machine.{key}={value}: no layout of {search.workers} ranks fits {size_text(search.room)} a rank; "
        f"the least, {least.choice}, takes {why}"
    )


def explained(search: LayoutSearch, best: list[RankedLayout]) -> list[str]:
    """The choice in at most five lines."""
    first, rest = best[0], best[1:]
    layout, step = first.choice, first.seconds
    shares = sorted(step._asdict().items(), key=lambda item: -item[1])
    times = ", ".join(f"{name} {each / step.total:.0%}" for name, each in shares if each >= 0.005 * step.total)
    parts = sorted(first.memory.items(), key=lambda item: -item[1])
    room = "no limit is known" if math.isinf(search.room) else f"{size_text(search.room)} a rank can hold"
    lines = [
        f"parallel=auto: {layout}: {time_text(step.total)} a step of {search.sequences} x {search.length:,} tokens, "
        f"the fastest of {len(search.ranked):,} layouts that fits",
        f"  time: {times}",
        f"  memory: {size_text(first.bytes)}, and {room}: "
        + ", ".join(f"{name} {size_text(size)}" for name, size in parts[:3]),
    ]
    if rest:
        lines.append(f"  the next: {rest[0].choice}, {rest[0].seconds.total / step.total - 1:+.1%}")
    return [*lines, f"  by {search.machine.source}"]


def table(search: LayoutSearch) -> list[str]:
    """The best layouts for people, and the keys of the first."""
    best = fitting(search, SHOWN)
    rows = [("layout", "s a step", "over the first", "tokens/s a rank", "a rank")]
    tokens = search.sequences * search.length / search.workers
    for each in best:
        total = each.seconds.total
        over = f"{total / best[0].seconds.total - 1:+.1%}"
        rows.append((str(each.choice), f"{total:.4g}", over, f"{tokens / total:,.0f}", size_text(each.bytes)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    config = search.settled(best[0].choice)
    keys = [f"parallel.{name}={size}" for name, size in best[0].choice.mesh.sizes.items()]
    keys += [f"scheduler.tokens_per_rank={config.scheduler.get('tokens_per_rank') or 'null'}"]
    keys += [f"engine.recompute={best[0].choice.recompute}"]
    return [
        *(f"{'' if i else 'auto':<12}{line}" for i, line in enumerate(explained(search, best))),
        *(f"{'' if i else 'layouts':<12}{line}" for i, line in enumerate(lines)),
        f"{'keys':<12}{' '.join(keys)}",
    ]


def time_text(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _check(config: RunConfig, mesh: Mesh, model: LM) -> None:
    from train.stages import refuse

    check_layout(config, mesh, model)
    refuse(config, model, "cpu", [])


def _memory(config: RunConfig, device: str) -> float:
    """Bytes of this machine, or of its device; none that is known where the workers run elsewhere."""
    if config.cluster.kind == "ray":
        return math.inf
    if device == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return float(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return math.inf
