"""`parallel.transport.recurrence=auto`: which transport of effects is fastest, from what a message costs.

The time that the last rank waits for its state, and the first for its gradient, with P ranks, L seconds a message, B
bytes a second, A and S bytes of a span's decay and state:

    gather    L + (P-1)·(A + S) / B  forward,  L + (P-1)·S / B  backward
    relay     (P-1)·(L + S/B)        each way
    allscan   (P-1 + b-1)·(L + S/(b·B))  each way, in b blocks (2507.01004, section 4)
"""

from typing import NamedTuple


class Wire(NamedTuple):
    """What a message between two ranks costs: `latency` seconds, and one more for every `bandwidth` bytes."""

    latency: float
    bandwidth: float


def seconds(ranks: int, decay: int, state: int, wire: Wire, blocks: int) -> dict[str, float]:
    """By transport, forward and backward together, of a layer whose effect has `decay` and `state` bytes."""
    latency, bandwidth = wire
    hops = ranks - 1
    return {
        "gather": 2 * latency + hops * (decay + 2 * state) / bandwidth,
        "relay": 2 * hops * (latency + state / bandwidth),
        "allscan": 2 * (hops + blocks - 1) * (latency + state / blocks / bandwidth),
    }


def choose(ranks: int, decay: int, state: int, wire: Wire, blocks: int) -> str:
    """The fastest, the simplest of equals."""
    found = seconds(ranks, decay, state, wire, blocks)
    return min(found, key=found.__getitem__)
