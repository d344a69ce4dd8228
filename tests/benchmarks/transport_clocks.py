"""How long a layer's crossing takes on each transport, rank by rank, from shapes and wires alone.

Every rank has a clock; an operation takes the clocks of all ranks [P] to those after it. Clocks need not agree: a relay
leaves them skewed, each rank a hop behind the one before, and the next layer's relay finds its states on time. What
brings them together again is a collective of all ranks, such as FSDP's gathering of weights.

A message costs `call` seconds for whoever starts it, `latency` on the way, and a second for every `bandwidth` bytes;
messages over one wire follow each other. Every wire is the same: there are no hosts here, and nobody else's traffic.
A collective is one call and one latency.

    gather    LASP-2 (2502.07563): P-1 payloads to every rank, beside local work
    relay     LASP (2404.02882): a state from rank to rank, a call for each hop; `late`: local work waits for it
    allscan   ZeCO (2507.01004): the relay in blocks inside one call, beside local work
    ring      ring attention (2310.01889): keys and values pass every rank, each hop beside the work on the last
    ulysses   all-to-all (2309.14509), to the heads and back; nothing is beside it

Legend: P ranks. Times in seconds, sizes in bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Clocks = NDArray[np.float64]  # [P]


@dataclass(frozen=True)
class Wires:
    """What messages cost, in seconds and bytes a second."""

    latency: float
    bandwidth: float
    call: float = 0.0

    def message(self, size: float) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Work:
    """A rank's own work in one direction of one layer. before: what the effect, or its gradient, is made by; beside:
    what needs no state; after: what does."""

    before: float
    beside: float
    after: float


def start(ranks: int) -> Clocks:
    return np.zeros(ranks)


def synchronised(clocks: Clocks) -> Clocks:
    """After a collective of all ranks that costs nothing itself."""
    return np.full_like(clocks, clocks.max())


def no_crossing(clocks: Clocks, work: Work) -> Clocks:
    """Data parallel: every rank has sequences of its own."""
    return clocks + work.before + work.beside + work.after


def gather(clocks: Clocks, work: Work, payload: float, wires: Wires) -> Clocks:
    """An all-gather of every rank's `payload`, started before the work beside it."""
    begun = clocks + work.before
    arrived = begun.max() + wires.call + wires.message((len(clocks) - 1) * payload)
    return np.maximum(begun + work.beside, arrived) + work.after


def relay(clocks: Clocks, work: Work, state: float, wires: Wires, *, late: bool = False) -> Clocks:
    """A state that passes from rank to rank. late: the work beside it waits for it, as first published."""
    begun = clocks + work.before
    done, arrived = np.empty_like(begun), -np.inf
    for r, own in enumerate(begun):
        knows = max(own, arrived)
        arrived = knows + wires.call + wires.message(state)
        done[r] = max(knows, own) + work.beside if late else max(knows, own + work.beside)
    return done + work.after


def allscan(clocks: Clocks, work: Work, state: float, wires: Wires, *, blocks: int = 4) -> Clocks:
    """The same in `blocks` of the state, each passed on as soon as it is there."""
    begun = clocks + work.before + wires.call
    arrived, done = np.full(blocks, -np.inf), np.empty_like(begun)
    for r, own in enumerate(begun):
        leaving, free = np.empty(blocks), own
        for b in range(blocks):
            free = max(free, own, arrived[b]) + state / blocks / wires.bandwidth
            leaving[b] = free + wires.latency
        known = max(own, arrived[-1])
        done[r] = max(known, own - wires.call + work.beside)
        arrived = leaving
    return done + work.after


def ring(clocks: Clocks, work: Work, keys: float, wires: Wires) -> Clocks:
    """Keys and values of a rank pass all the others; `work.after` is that on all of them, a P-th of it beside a hop."""
    clocks = clocks + work.before + work.beside
    step = work.after / len(clocks)
    for _ in range(len(clocks) - 1):
        sent = clocks + wires.call + wires.message(keys)
        clocks = np.maximum(clocks + step, np.roll(sent, 1))
    return clocks + step


def ulysses(clocks: Clocks, work: Work, there: float, back: float, wires: Wires) -> Clocks:
    """Of `there` bytes of queries, keys and values each rank keeps a P-th; of `back` of outputs as well."""
    share = 1 - 1 / len(clocks)
    whole = (clocks + work.before + work.beside).max() + 2 * wires.call + 2 * wires.latency
    return np.full_like(clocks, whole + share * (there + back) / wires.bandwidth + work.after)


def backwards(way: Callable[..., Clocks], clocks: Clocks, work: Work, size: float, wires: Wires, **how: int) -> Clocks:
    """A crossing from the last rank to the first."""
    return way(clocks[::-1], work, size, wires, **how)[::-1]


def step(
    way: Callable[..., Clocks],
    ranks: int,
    layers: int,
    works: tuple[Work, Work],
    size: float,
    wires: Wires,
    *,
    together: bool,
    **how: int,
) -> float:
    """Seconds of a step of `layers` layers, forward and backward, which differ in `works`.

    together: all ranks meet before each layer, as where FSDP gathers its weights.
    """
    clocks = start(ranks)
    for direction, work in zip((way, None), works, strict=True):
        for _ in range(layers):
            clocks = synchronised(clocks) if together else clocks
            if direction is None:
                clocks = backwards(way, clocks, work, size, wires, **how)
            else:
                clocks = direction(clocks, work, size, wires, **how)
    return float(clocks.max())
