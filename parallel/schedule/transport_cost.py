"""`parallel.transport.recurrence=auto`: which transport of effects is fastest, from what a message costs.

The time that the last span waits for its state, and the first for its gradient, with P ranks, L seconds a message, B
bytes a second, A and S bytes of a span's decay and state, and n spans a rank, so that h = n·(P-1) of them are entered
from another rank (two in zigzag, where the last rank's follow each other):

    gather    L + h·(A + S) / B  forward,  L + h·S / B  backward
    relay     h·(L + S/B)        each way
    allscan   (h + b-1)·(L + S/(b·B))  each way, in b blocks (2507.01004, section 4)
"""

from typing import NamedTuple


class LinkCost(NamedTuple):
    """The cost of a message between two ranks: `latency` seconds, and one more for every `bandwidth` bytes."""

    latency: float
    bandwidth: float


def seconds(ranks: int, decay: int, state: int, wire: LinkCost, blocks: int, spans: int = 1) -> dict[str, float]:
    """Seconds of each transport, forward and backward together, for a layer whose effect has `decay` and `state`
    bytes."""
    latency, bandwidth = wire
    hops = spans * (ranks - 1)
    return {
        "gather": 2 * latency + hops * (decay + 2 * state) / bandwidth,
        "relay": 2 * hops * (latency + state / bandwidth),
        "allscan": 2 * (hops + blocks - 1) * (latency + state / blocks / bandwidth),
    }


def choose(ranks: int, decay: int, state: int, wire: LinkCost, blocks: int, spans: int = 1) -> str:
    """The fastest, the simplest of equals."""
    costs = seconds(ranks, decay, state, wire, blocks, spans)
    return min(costs, key=costs.__getitem__)
