"""The seconds of a step in a layout, from the costs of its groups and the bytes of its other dimensions.

A micro-step of a group is that of `adaptive.cost`: computing, and what its transports send. The other dimensions are
added by what they send, as `tensor_volume`, `expert_volume` and `comm_volume.of_weights` count it, over the wire of
their groups. A rank's neighbours are its tensor group; groups of the dimensions outside of it (`mesh.DIMENSIONS`) reach
over as many ranks as all dimensions inside of them have, so a group stays inside a machine as long as that does.

A tensor group shares out computing, and so does a pipeline, whose stages wait for each other (`stages.idle`). Gathering
weights and reducing their gradients overlaps with computing on a device that has streams, and a CPU does one thing
after the other.

Not modelled: smaller matmuls that run slower, contention of groups on one wire, the optimizer's update.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from parallel.schedule.adaptive.cost import Costs, Wire
from parallel.schedule.comm_volume import Unit, of_weights
from parallel.schedule.expert_volume import ExpertCall, evenly
from parallel.schedule.layouts import LayoutChoice
from parallel.schedule.tensor_volume import TensorCall, of_copies

SELECTIVE = 0.05  # of the forward pass, which selective recomputation runs again besides what it keeps


@dataclass(frozen=True)
class LayoutWork:
    """The work of a model on a rank of some tensor ranks.

    costs: of groups, by their size, computing undivided, messages of the ranks' own share. calls: a forward pass's in
    tensor groups. experts: those of all layers. units, expert_units: of weights that are gathered together. crossing:
    bytes of a token between two stages. overlap: weights travel while a rank computes.
    """

    costs: Costs
    calls: Counter[TensorCall]
    experts: Counter[ExpertCall]
    units: Sequence[Unit]
    expert_units: Sequence[Unit]
    crossing: float
    overlap: bool


class StepSeconds(NamedTuple):
    """Seconds of a step by what a rank does or waits for. weights: only what computing does not hide."""

    computing: float
    sequence: float
    tensor: float
    expert: float
    weights: float
    pipeline: float

    @property
    def total(self) -> float:
        return sum(self)


Wires = Callable[[int], Wire]


def seconds(
    choice: LayoutChoice,
    work: LayoutWork,
    length: int,
    wires: Wires,
    *,
    waits: float = 0.0,
    share: float = 1.0,
    padded: bool = False,
) -> StepSeconds:
    """Seconds of a step of sequences of this `length`.

    wires: by the ranks from a group's first to its last. waits: the share of a step that pipeline ranks wait. share: of
    the fullest stage, of the model's work.
    """
    mesh, tokens, steps = choice.mesh, choice.tokens(length), choice.micro_steps
    costs, lengths = work.costs, [length] * choice.together
    again = choice.recompute == "full"
    computing = float(costs.computing(lengths, int(again and len(costs.names) > 1)).sum()) / mesh.sequence
    if choice.recompute == "selective":
        computing *= 1 + SELECTIVE / 3
    stage = share / mesh.tensor
    group = mesh.sequence
    sent = float((costs.sending(group) * sum(lengths) + costs.fixed(group)).sum()) * (4 / 3 if again else 1)
    weights, reach = _weights(choice, work, wires), mesh.tensor * mesh.sequence * mesh.expert
    one = computing * stage + costs.model.launch * share
    hidden = min(weights * share, steps * one) if work.overlap else 0.0
    busy = steps * one
    sequence = steps * sent * share
    tensor = steps * share * _tensor(choice, work, tokens, wires(mesh.tensor))
    expert = steps * share * _expert(choice, work, tokens, wires(reach), padded=padded)
    pipeline = (busy + sequence + tensor + expert) * waits / (1 - waits)
    if mesh.pipeline > 1:
        wire = wires(mesh.world)
        pipeline += 2 * steps * (tokens * work.crossing / wire.bandwidth + wire.latency)
    return StepSeconds(busy, sequence, tensor, expert, weights * share - hidden, pipeline)


def _tensor(choice: LayoutChoice, work: LayoutWork, tokens: int, wire: Wire) -> float:
    ranks, total = choice.mesh.tensor, 0.0
    if ranks == 1:
        return 0.0
    for call, times in work.calls.items():
        size, count = call.received(tokens, ranks)
        passes = 2 if call.in_layer and choice.recompute == "full" else 1
        total += times * passes * (size / wire.bandwidth + count * wire.latency)
        if call.graded:
            size, count = call.received(tokens, ranks, backward=True)
            total += times * (size / wire.bandwidth + count * wire.latency)
    return total


def _expert(choice: LayoutChoice, work: LayoutWork, tokens: int, wire: Wire, *, padded: bool) -> float:
    ranks, total = choice.mesh.expert, 0.0
    if ranks == 1:
        return 0.0
    for call, times in work.experts.items():
        if padded and call.capacity is not None:
            both = call.padded(ranks, [(choice.together, -(-tokens // choice.together))])
        else:
            both = call.counted(ranks, *evenly(call, ranks, tokens, (ranks - 1) * tokens))
        for way, passes in ((both.forward, 2 if choice.recompute == "full" else 1), (both.backward, 1)):
            size, count = sum(way.bytes.values()), sum(way.calls.values())
            total += times * passes * (size / wire.bandwidth + count * wire.latency)
    return total


def _weights(choice: LayoutChoice, work: LayoutWork, wires: Wires) -> float:
    """Seconds of a step's weights and gradients, and of the sums over copies."""
    mesh, total = choice.mesh, 0.0
    inside = mesh.tensor * mesh.sequence * mesh.expert * mesh.data
    for units, ranks in (
        (work.units, mesh.data * mesh.expert * mesh.sequence),
        (work.expert_units, mesh.data * mesh.sequence),
    ):
        wire = wires(inside)
        traffic = of_weights(units, ranks, choice.micro_steps)
        total += sum(traffic.bytes.values()) / wire.bandwidth + sum(traffic.calls.values()) * wire.latency
        copies, wire = of_copies(units, ranks, mesh.replicate), wires(inside * mesh.replicate)
        total += sum(copies.bytes.values()) / wire.bandwidth + sum(copies.calls.values()) * wire.latency
    return total


def cached_wires(wire: Wires) -> Wires:
    return cache(wire)
