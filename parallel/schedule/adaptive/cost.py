"""The cost of a micro-step, from the work of its layers: seconds and bytes, by the sizes of its groups and what they
hold.

A group of g ranks that holds sequences of s tokens takes, in one micro-step of training (forward and backward),

    sum over s of [ layers · (pair · pairs(s) + token · s) / g / speed ]      computing
    sum over s of [ layers · bytes(g) · s ] / bandwidth(g)                    keys, values, queries, outputs
    layers · (calls · latency(g) + states(g) / bandwidth(g))                  states, whatever the lengths are
    launch                                                                    what a micro-step costs at all

where pairs(s) is s²/2 for full softmax attention, and w·s - w²/2 for a window of w < s tokens, and none for a linear
mixer, whose states are sent once a layer, whatever is packed: (g-1) states gathered, or one with a scan. A rank
receives bytes(g) for each token of its group: a g-th of a token's where heads are exchanged. `shapes.py` reads both off
`comm_volume` for any transport. Nothing is sent in a group of one. Experts cost by tokens and belong to `Layer.token`.

All ranks are in lockstep (FSDP's collectives are all ranks'), so a micro-step takes as long as its slowest group. What
a step sends once, however many micro-steps it has (`Model.once`), comes on top. Where experts are spread over ranks of
several groups (`Model.meets`), groups meet in every layer, and a micro-step is the sum over the kinds of layers of the
slowest group's time in that kind.

Seconds and bytes throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

StateTransport = Literal["gather", "scan"]
STATE_TRANSPORTS = get_args(StateTransport)


class Wire(NamedTuple):
    """The cost of a rank's messages in a group: `latency` seconds a call, and one second for every `bandwidth`
    bytes."""

    bandwidth: float
    latency: float = 0.0


class NoRoomError(ValueError):
    """A model's states alone fill a rank."""


class Messages(NamedTuple):
    """Traffic that a rank of a group receives in one layer, forward and backward: `fixed` bytes whatever the group
    holds, `token` bytes more for every token of the group, in `calls` messages. seconds, token_seconds: that a rank
    computes for it, whatever the group holds and for every token of the group: effects, packing, spans."""

    fixed: float
    token: float
    calls: float
    seconds: float = 0.0
    token_seconds: float = 0.0


@dataclass(frozen=True)
class Layer:
    """`count` layers of one kind, each with its feed-forward or experts.

    pair: seconds a pair of a query and a key. token: seconds a token. window: tokens that a query sees; None: all.
    token_bytes: bytes that a group sends for each of its tokens, in both directions, where it has several ranks.
    state_bytes: bytes of a state; states: `gather` (each rank receives those of all others) or `scan` (one).
    calls: messages a layer, in both directions, where a group has several ranks. by_size: the messages of each size of
    group instead of those four.
    """

    count: int
    pair: float = 0.0
    token: float = 0.0
    window: int | None = None
    token_bytes: float = 0.0
    state_bytes: float = 0.0
    states: str = "scan"
    calls: int = 0
    by_size: tuple[tuple[int, Messages], ...] = ()

    def __post_init__(self) -> None:
        if self.states not in STATE_TRANSPORTS:
            raise ValueError(f"states={self.states}: must be one of {', '.join(STATE_TRANSPORTS)}")

    def pairs(self, lengths: Floats) -> Floats:
        """Pairs of a query and a key that it sees, of a causal layer."""
        if self.window is None:
            return lengths * lengths / 2
        inside = np.minimum(lengths, self.window)
        return inside * inside / 2 + (lengths - inside) * self.window

    def messages(self, size: int) -> Messages:
        """Raises KeyError for a size that `by_size` does not have."""
        if size == 1:
            return Messages(0, 0, 0)
        if self.by_size:
            return dict(self.by_size)[size]
        states = size - 1 if self.states == "gather" else 1
        return Messages(2 * self.state_bytes * states, self.token_bytes / size, self.calls)


@dataclass(frozen=True)
class Recompute:
    """A choice of the parts that a backward pass computes again. activations: bytes kept, over those with nothing
    computed again. tokens, pairs: seconds, over those with nothing computed again."""

    name: str
    activations: float = 1.0
    tokens: float = 1.0
    pairs: float = 1.0


NONE = Recompute("none")


@dataclass(frozen=True)
class Model:
    """Costs of a model's layers on one rank of speed 1.

    launch: seconds of a micro-step that do not depend on its tokens. state_bytes: parameters, gradients and moments
    of the whole model, sharded over all ranks. resident_bytes: on each rank whatever the sharding (gathered layers,
    buffers). activation_bytes: a token's, kept for the backward pass. logit_bytes: a token's, never recomputed.
    recompute: the choices that a group has, NONE first. meets: experts are spread over ranks of several groups. once:
    seconds of a step whatever its micro-steps are: weights that are gathered, gradients that are reduced once a step.
    """

    name: str
    layers: tuple[Layer, ...]
    launch: float
    state_bytes: float
    activation_bytes: float
    logit_bytes: float = 0.0
    resident_bytes: float = 0.0
    recompute: tuple[Recompute, ...] = (NONE,)
    meets: bool = False
    once: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """`ranks` of `memory` bytes each. wires: from this group size on, up to the next one given.

    speeds, memories: a rank's own, of `ranks` entries; None: all ranks are alike (speed 1, `memory` bytes).
    most_tokens: that a rank may hold at a time, whatever its memory.
    """

    name: str
    ranks: int
    memory: float
    wires: dict[int, Wire] = field(hash=False)
    speeds: tuple[float, ...] | None = None
    memories: tuple[float, ...] | None = None
    most_tokens: float = math.inf

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks}: must be at least 1")
        if 1 not in self.wires:
            raise ValueError(f"wires={sorted(self.wires)}: must say what a group of 1 has")
        for name in ("speeds", "memories"):
            values = getattr(self, name)
            if values is not None and (len(values) != self.ranks or min(values) <= 0):
                raise ValueError(f"{name}={list(values)}: must be {self.ranks} positive numbers, one a rank")

    @classmethod
    def of_machines(
        cls, name: str, machines: int, per_machine: int, memory: float, inside: Wire, across: Wire
    ) -> Cluster:
        """Equal machines. Aligned groups whose size divides a machine's ranks stay inside of one; others do not."""
        ranks = machines * per_machine
        wires = {s: inside if per_machine % s == 0 else across for s in powers(ranks)}
        return cls(name, ranks, memory, wires)

    def wire(self, size: int) -> Wire:
        return self.wires[max(s for s in self.wires if s <= size)]


def powers(ranks: int) -> list[int]:
    """The sizes of groups: powers of two up to `ranks`."""
    return [1 << i for i in range(ranks.bit_length())]


class Costs:
    """Costs of groups on this cluster with this model.

    sizes: of groups, powers of two, or `sizes` of them. Raises NoRoomError where the model's states alone fill a rank.
    """

    def __init__(self, model: Model, cluster: Cluster, sizes: Sequence[int] | None = None):
        self.model, self.cluster = model, cluster
        self.sizes = list(sizes) if sizes is not None else powers(cluster.ranks)
        self.names = [choice.name for choice in model.recompute]
        n = cluster.ranks
        self.speeds = np.array(cluster.speeds or (1.0,) * n)
        memories = np.array(cluster.memories or (cluster.memory,) * n)
        self.states = model.state_bytes / n + model.resident_bytes
        free = memories - self.states
        if free.min() <= 0:
            raise NoRoomError(
                f"model {model.name} takes {self.states / 2**30:.3g} GiB of states on each of {n} ranks, and a rank "
                f"has {memories.min() / 2**30:.3g}: more ranks or more memory would change that"
            )
        self.token_bytes = np.array(
            [model.activation_bytes * choice.activations + model.logit_bytes for choice in model.recompute]
        )
        self.rank_tokens = np.minimum(free[None] / self.token_bytes[:, None], cluster.most_tokens)
        """[recompute, ranks], tokens that a rank may hold."""
        self._messages = {size: (self._sending(size), self._fixed(size)) for size in self.sizes}

    @property
    def alike(self) -> bool:
        return bool(np.ptp(self.speeds) == 0 and np.ptp(self.rank_tokens[0]) == 0)

    def room(self, choice: int, first: int, size: int) -> float:
        """Tokens that ranks [first, first + size) may hold together, spread evenly."""
        return float(self.rank_tokens[choice, first : first + size].min()) * size

    def computing(self, lengths: Sequence[int] | Floats, choice: int = 0) -> Floats:
        """Seconds [kinds of layers, sequences] on one rank of speed 1."""
        tokens, how = np.asarray(lengths, dtype=np.float64), self.model.recompute[choice]
        return np.stack(
            [
                layer.count * (layer.pair * how.pairs * layer.pairs(tokens) + layer.token * how.tokens * tokens)
                for layer in self.model.layers
            ]
        )

    def sending(self, size: int) -> Floats:
        """Seconds [kinds of layers] for each token of a sequence on a group of `size`."""
        return self._messages[size][0]

    def fixed(self, size: int) -> Floats:
        """Seconds [kinds of layers] that a group's messages take whatever it holds."""
        return self._messages[size][1]

    def _sending(self, size: int) -> Floats:
        bandwidth = self.cluster.wire(size).bandwidth
        sent = [(layer.count, layer.messages(size)) for layer in self.model.layers]
        return np.array([n * (each.token / bandwidth + each.token_seconds) for n, each in sent])

    def _fixed(self, size: int) -> Floats:
        wire, sent = self.cluster.wire(size), [(layer.count, layer.messages(size)) for layer in self.model.layers]
        return np.array(
            [n * (each.calls * wire.latency + each.fixed / wire.bandwidth + each.seconds) for n, each in sent]
        )

    def group(self, lengths: Sequence[int], first: int, size: int, choice: int = 0) -> Floats:
        """Seconds [kinds of layers] of a group on ranks [first, first + size), the launch left out."""
        tokens = np.asarray(lengths, dtype=np.float64)
        speed = self.speeds[first : first + size].min()
        return (
            self.computing(tokens, choice).sum(1) / size / speed
            + self.sending(size) * tokens.sum()
            + self.fixed(size) * bool(len(tokens))
        )

    def micro_step(self, groups: Sequence[Floats]) -> float:
        """Seconds of a micro-step from those of its groups."""
        if not groups:
            return self.model.launch
        held = np.stack(list(groups))
        return self.model.launch + float(held.max(0).sum() if self.model.meets else held.sum(1).max())
