"""The machines, and the ranks that each holds. Plain data: no Ray, no torch, no process.

The axes of the mesh differ in how much they say and how often. Tensor and expert groups exchange activations in every
layer and cannot wait: they stay inside a machine. Sequence groups exchange states or keys and values in every layer:
inside a machine if it can be done, else on machines next to each other. Data and pipeline groups speak least and may
lie anywhere. Ranks are row-major in the order of the axes, outermost first, so that the groups of the inner axes are
neighbouring ranks; what is left to decide is where one machine ends and the next begins.

Machines are taken in the natural order of their addresses (n2 before n10, 10.0.0.9 before 10.0.0.10): on most clusters
neighbours in number are neighbours in the network. It is also all that the workers of a running job know of each
other, so that they arrive at the same order (`order`).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

BOUND = ("expert", "tensor")  # axes whose groups never leave a machine


@dataclass(frozen=True)
class Node:
    """A machine with room for `slots` workers."""

    name: str
    address: str
    slots: int


@dataclass(frozen=True)
class Placement:
    """`filled[i]` consecutive ranks on nodes[i]; `sizes`: of the mesh's axes, outermost first."""

    nodes: tuple[Node, ...]
    filled: tuple[int, ...]
    sizes: dict[str, int]

    @property
    def ranks(self) -> list[tuple[str, int]]:
        """Each rank's machine, by name, and the rank's index there."""
        return [(node.name, i) for node, filled in zip(self.nodes, self.filled, strict=True) for i in range(filled)]

    def lines(self) -> list[str]:
        """For people: a line a machine, and a line an axis that says how its groups lie."""
        width = max(len(node.name) for node in self.nodes)
        return [f"{node.name:<{width}}  {_span(first, last)}" for node, first, last in self._spans()] + [
            f"{axis} x{size}: {self._lie(axis)}" for axis, size in self.sizes.items() if size > 1
        ]

    def _spans(self) -> list[tuple[Node, int, int]]:
        ends = [sum(self.filled[: i + 1]) for i in range(len(self.filled))]
        return [(n, e - f, e - 1) for n, f, e in zip(self.nodes, self.filled, ends, strict=True)]

    def _lie(self, axis: str) -> str:
        machine = [i for i, filled in enumerate(self.filled) for _ in range(filled)]
        touched = [len({machine[rank] for rank in group}) for group in groups(self.sizes, axis)]
        fewest, most = min(touched), max(touched)
        if most == 1:
            return "inside a node"
        if axis in ("data", "pipeline"):
            return "across nodes"
        return f"over {most if fewest == most else f'{fewest} to {most}'} neighbouring nodes"


def groups(sizes: dict[str, int], axis: str) -> list[list[int]]:
    """The ranks of each group of an axis: those that differ in nothing else."""
    stride = _extent(sizes, axis) // sizes[axis]
    extent = stride * sizes[axis]
    return [
        list(range(first + offset, first + extent, stride))
        for first in range(0, math.prod(sizes.values()), extent)
        for offset in range(stride)
    ]


def place(workers: int, nodes: Sequence[Node], sizes: dict[str, int]) -> Placement:
    """Chooses machines for `workers` ranks, and how many each holds.

    `sizes`: of the mesh's axes, outermost first; their product is `workers`. In this order of importance: tensor and
    expert groups inside a machine; sequence groups inside a machine; the fewest machines; all equally filled; sequence
    groups that cannot stay inside cut in as few places as the fewest machines allow; machines next to each other.
    Raises ValueError, in one line that starts with the key, when the groups or the workers do not fit.
    """
    if math.prod(sizes.values()) != workers:
        mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(f"cluster.workers={workers}: must be the product of the mesh's sizes ({mesh})")
    ordered = sorted(nodes, key=lambda node: (natural(node.address), natural(node.name)))
    block = _check_room(workers, ordered, sizes)
    whole = max(block, _extent(sizes, "sequence") if "sequence" in sizes else 1)
    if _holds(workers, ordered, whole):
        choices = [_choose(workers, ordered, whole)]
    else:
        parts = [part for part in range(block, whole + 1, block) if whole % part == 0]
        choices = [_choose(workers, ordered, part) for part in parts if _holds(workers, ordered, part)]
    fewest = min(len(chosen) for chosen, _ in choices)
    least = [(chosen, filled) for chosen, filled in choices if len(chosen) == fewest]
    # The last is of the coarsest parts. Equal fill goes before it: all machines have the same links.
    chosen, filled = next((c for c in reversed(least) if len(set(c[1])) == 1), least[-1])
    return Placement(tuple(ordered[i] for i in chosen), tuple(filled), dict(sizes))


def order(members: Sequence[tuple[str, str, int]]) -> list[int]:
    """Indices of `members`, each (address of its machine, id of its machine, its index there), in the order of ranks.

    This is how the workers of a running job agree on ranks: machines in the natural order of their addresses, as in
    `place`; a machine's id only tells several apart that share an address. It suffices for sequence groups, because
    they are neighbouring ranks: the mesh itself is flat (`parallel.mesh.everyone`), and every scheduler lays the
    ranks out row-major with sequence inside data, group g being ranks g * sequence to (g + 1) * sequence - 1
    (`parallel.schedule.static`).
    """

    def key(i: int) -> tuple[Any, str, int]:
        address, machine, local = members[i]
        return natural(address), machine, local

    return sorted(range(len(members)), key=key)


def natural(text: str) -> tuple[tuple[str | int, ...], str]:
    """A sorting key by which numbers inside a text count as numbers; the text itself tells n01 from n1."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text))), text


def _extent(sizes: dict[str, int], axis: str) -> int:
    """Neighbouring ranks that the groups of an axis fill together with all axes inside it."""
    axes = list(sizes)
    return math.prod(sizes[inner] for inner in axes[axes.index(axis) :])


def _check_room(workers: int, nodes: Sequence[Node], sizes: dict[str, int]) -> int:
    """Ranks that must stay together on a machine. Raises ValueError where they, or all workers, find no room."""
    largest = max((node.slots for node in nodes), default=0)
    block, narrowest = 1, ""
    for axis in reversed([axis for axis in BOUND if sizes.get(axis, 1) > 1]):
        block, narrowest = max(block, _extent(sizes, axis)), axis
        if block > largest >= 1:
            inner = "" if block == sizes[axis] else f" ({block} ranks with the axes inside it)"
            raise ValueError(
                f"parallel.{axis}={sizes[axis]}: a group{inner} must fit inside a node; "
                f"the largest has {_workers(largest)} ({_list(nodes)})"
            )
    room = sum(node.slots for node in nodes)
    if room < workers:
        raise ValueError(f"cluster.workers={workers}: the cluster has room for {room} ({_list(nodes)})")
    usable = sum(node.slots // block * block for node in nodes)
    if usable < workers:
        raise ValueError(
            f"parallel.{narrowest}={sizes[narrowest]}: a group must fit inside a node; whole groups have room for "
            f"{usable} of cluster.workers={workers} ({_list(nodes)})"
        )
    return block


def _holds(workers: int, nodes: Sequence[Node], part: int) -> bool:
    return sum(node.slots // part * part for node in nodes) >= workers


def _choose(workers: int, nodes: Sequence[Node], part: int) -> tuple[list[int], list[int]]:
    """The fewest nodes that hold `workers` in whole parts, as equally filled as possible; (indices, ranks on each).

    Larger nodes never make the fill less equal, so the largest ones bound it; the nodes chosen are the closest
    together, then the first, among those that reach it.
    """
    room = {i: node.slots // part for i, node in enumerate(nodes) if node.slots >= part}
    parts = workers // part
    by_size = sorted(room, key=lambda i: (-room[i], i))
    count, held = 0, 0
    while held < parts:
        held += room[by_size[count]]
        count += 1
    candidates = [sorted(by_size[:count])]
    for least in sorted(set(room.values())):
        large = [i for i in room if room[i] >= least]
        windows = (large[at : at + count] for at in range(len(large) - count + 1))
        candidates += [window for window in windows if sum(room[i] for i in window) >= parts]

    @cache  # most windows of a large cluster look alike
    def spread(room: tuple[int, ...]) -> int:
        filled = _fill(parts, room)
        return max(filled) - min(filled)

    def judged(chosen: list[int]) -> tuple[int, int, list[int]]:
        return spread(tuple(room[i] for i in chosen)), chosen[-1] - chosen[0], chosen

    chosen = min(candidates, key=judged)
    return chosen, [part * n for n in _fill(parts, [room[i] for i in chosen])]


def _fill(parts: int, room: Sequence[int]) -> list[int]:
    """`parts` dealt as equally as possible to nodes with `room` for so many each; the first ones get what is over."""
    level = max(n for n in range(max(room) + 1) if sum(min(r, n) for r in room) <= parts)
    filled = [min(r, level) for r in room]
    over = parts - sum(filled)
    for i, r in enumerate(room):
        if over and r > level:
            filled[i] += 1
            over -= 1
    return filled


def _span(first: int, last: int) -> str:
    return f"rank {first}" if first == last else f"ranks {first}-{last}"


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def _list(nodes: Iterable[Node], most: int = 8) -> str:
    """Nodes with their slots, for one line."""
    named = [f"{node.name}: {node.slots}" for node in nodes]
    left = len(named) - most
    return ", ".join(named[:most]) + (f", and {left} more" if left > 0 else "") or "no machines"
