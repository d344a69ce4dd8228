"""Refusal of a layout whose tensors do not fit the memory of a rank, where the configuration says how much that is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launch.preflight.checked import CheckedRun

if TYPE_CHECKING:  # torch is loaded once the configuration has been read
    from train.rank_memory import MemoryLayout, MemoryModel

AGAIN = ("selective", "full")  # choices of recomputation, the dearer ones last


def check_memory(flight: CheckedRun) -> None:
    """Raises ValueError that names the largest part and tensor of the first step's peak, and what would make it fit."""
    from train.engines.refusals import plain
    from train.layout_search import room_of
    from train.rank_memory import MemoryModel, layout_of

    config, about = flight.config, flight.config.parallel.machine
    room = room_of(about)
    if room is None or not plain(config):
        return
    lengths = [len(s.tokens) for s in flight.batches.batch(config.seed, 0)]
    scheduler: Any = config.scheduler.build()
    plan = scheduler.plan(0, lengths, data=flight.data, sequence=flight.sequence)
    memory = MemoryModel(config, flight.device, exact=True)
    layout = layout_of(config, memory.build(), flight.mesh, plan, flight.device)
    try:
        parts = memory.parts(layout)
    except NotImplementedError:
        return  # of a model whose course depends on data, nothing is known
    if sum(parts.values()) > room:
        key = f"memory={about.memory:g}" if about.memory is not None else f"device={about.device}"
        raise ValueError(
            f"parallel.machine.{key}: a rank can hold {size_text(room)}, and {flight.mesh} takes "
            f"{too_much(memory, layout, parts, room)}"
        )


def too_much(memory: MemoryModel, layout: MemoryLayout, parts: dict[str, float], room: float) -> str:
    """The end of a refusal: bytes, the largest part, the largest tensor, and what would make it fit."""
    part, size = max(parts.items(), key=lambda item: item[1])
    name, weight = memory.largest(layout.mesh)
    return (
        f"{size_text(sum(parts.values()))}, of which {part} are {size_text(size)}; the largest tensor, {name}, is "
        f"{size_text(weight)} whole; {_remedy(memory, layout, room)}"
    )


def _remedy(memory: MemoryModel, layout: MemoryLayout, room: float) -> str:
    """Says what to change so that a layout fits: recomputation alone, or more ranks."""
    for choice in AGAIN if layout.recompute == "none" else AGAIN[1:] if layout.recompute == "selective" else ():
        size = sum(memory.parts(replace(layout, recompute=choice)).values())
        if size <= room:
            return f"engine.recompute={choice} would make it fit, with {size_text(size)}"
    if not memory.config.engine.get("reshard_after_forward", True):
        return "engine.reshard_after_forward=true with more ranks (cluster.workers) would make it fit"
    return "more ranks (cluster.workers) or a smaller data.max_length would make it fit"


def size_text(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:,.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    raise AssertionError
