"""Traffic in tensor groups, and between the copies of shards, in bytes and calls that a rank receives.

Counterpart of `parallel.schedule.comm_volume` for the other dimensions of the mesh; what a model exchanges by token is
found by `train.metrics.comm_trace`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from parallel.schedule.comm_volume import GRADIENT, Traffic, Unit
from parallel.schedule.plan import Plan

Kind = Literal["gather", "scatter", "reduce"]


@dataclass(frozen=True)
class TensorCall:
    """An exchange of a forward pass: of `numbers` a token, each of `itemsize` bytes.

    gather: every rank's share of the tokens to all; scatter: the sum, a share to each, in at least four bytes a number;
    reduce: the sum of all tokens to all. graded: a gradient takes the way back. in_layer: made again where its layer
    is computed again. chunk: of how many tokens at a time.
    """

    kind: Kind
    purpose: str
    numbers: int
    itemsize: int
    graded: bool = True
    in_layer: bool = True
    chunk: int | None = None

    def received(self, tokens: int, ranks: int, *, backward: bool = False) -> tuple[int, int]:
        """Bytes and calls of a rank that has so many tokens."""
        kind = {"gather": "scatter", "scatter": "gather"}.get(self.kind, self.kind) if backward else self.kind
        if kind == "reduce":
            return 2 * (ranks - 1) * tokens * self.numbers * self.itemsize // ranks, 1
        if self.chunk is not None:
            return (ranks - 1) * tokens * self.numbers * self.itemsize, -(-tokens // self.chunk)
        wide = max(self.itemsize, 4) if kind == "scatter" else self.itemsize
        return (ranks - 1) * -(-tokens // ranks) * self.numbers * wide, 1


def of_tensor(plan: Plan, calls: Sequence[TensorCall], ranks: int, *, recompute: str = "none") -> dict[int, Traffic]:
    """Traffic that each rank of a plan receives in its tensor group of so many `ranks`, in a step of training, but for
    the gradients of `of_partial`. recompute: `engine.recompute`."""
    traffic: dict[int, Traffic] = {}
    for micro in plan.micro_steps:
        for group in micro.groups:
            for rank, held in zip(group.ranks, group.spans, strict=True):
                tokens = sum(end - begin for begin, end in held) or 1  # an idle rank has a masked one
                total = traffic.setdefault(rank, Traffic())
                for call in calls:
                    size, times = call.received(tokens, ranks)
                    for _ in range(2 if call.in_layer and recompute == "full" else 1):
                        total.add(call.purpose, size, times)
                    if call.graded:
                        total.add(call.purpose + GRADIENT, *call.received(tokens, ranks, backward=True))
    return traffic


class Shared(NamedTuple):
    """Parameters of which `copies` ranks of a tensor group hold the same piece: rows and numbers a row of each."""

    copies: int
    shapes: tuple[tuple[int, int], ...]


def of_partial(shared: Iterable[Shared], ranks: int, itemsize: int) -> list[Traffic]:
    """Traffic of the sums of their gradients, that each of the `ranks` receives over which FSDP shards them."""
    calls = []
    for rank in range(ranks):
        total = Traffic()
        for copies, shapes in shared:
            held = sum((_begin(rows, rank + 1, ranks) - _begin(rows, rank, ranks)) * rest for rows, rest in shapes)
            if copies > 1 and shapes:
                total.add("partial gradients", 2 * (copies - 1) * held * itemsize // copies)
        calls.append(total)
    return calls


def _begin(rows: int, rank: int, ranks: int) -> int:
    return min(rank * -(-rows // ranks), rows)


def of_copies(units: Iterable[Unit], ranks: int, copies: int) -> Traffic:
    """Traffic of the sums of gradients over so many `copies` of the shards of `ranks`."""
    total = Traffic()
    for unit in units:
        shard = unit.shard(ranks)
        if copies > 1:
            total.add("weights" + GRADIENT, 2 * (copies - 1) * shard // copies)
    return total
