"""Bytes that ranks receive from each other: in a step, for its record; and how fast, for a transport that is to be
chosen."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from parallel.collectives import LEDGER, LedgerEntry
from parallel.matrix_owners import PURPOSE
from parallel.mesh import Groups
from parallel.pipeline.runner import SHARED
from parallel.pipeline.stage import ACTIVATIONS
from parallel.schedule.comm_volume import GRADIENT, SCALES, Ask, ScanCall
from parallel.schedule.expert_volume import COUNTS, OUTPUTS, ROWS
from parallel.schedule.transport_cost import LinkCost
from parallel.sequence.states import AutoTransport
from parallel.sequence.states.auto import measure
from train.hooks import Hook

OTHER = LedgerEntry("world", "other")  # what has no name of its own in a record
ENTRIES = (
    *(
        LedgerEntry("sequence", purpose + way)
        for purpose in ("state", "halo", "queries", "keys and values", "outputs", "document sums")
        for way in ("", GRADIENT)
    ),
    *(LedgerEntry(axis, "weights" + way) for axis in ("world", "dense") for way in ("", GRADIENT)),
    *(LedgerEntry(axis, SCALES) for axis in ("world", "dense")),
    LedgerEntry("replicate", "weights" + GRADIENT),
    *(LedgerEntry("tensor", purpose + way) for purpose in ("hidden", "channels") for way in ("", GRADIENT)),
    LedgerEntry("tensor", "loss"),
    LedgerEntry("tensor", "partial gradients"),
    *(LedgerEntry("expert", purpose + way) for purpose in (ROWS, OUTPUTS) for way in ("", GRADIENT)),
    LedgerEntry("expert", COUNTS),
    *(LedgerEntry("experts", "weights" + way) for way in ("", GRADIENT)),
    *(LedgerEntry("pipeline", purpose) for purpose in (ACTIVATIONS, ACTIVATIONS + GRADIENT, SHARED)),
    *(LedgerEntry(axis, PURPOSE) for axis in ("world", "dense", "tensor")),
    OTHER,
)
COLUMNS = 2 * len(ENTRIES)


def taken() -> list[float]:
    """This rank's bytes, then its calls, of every entry since the ledger was last emptied."""
    sums = [dict.fromkeys(ENTRIES, 0.0) for _ in range(2)]
    for columns, counts in zip(sums, LEDGER.take(), strict=True):
        for entry, count in counts.items():
            columns[entry if entry in columns else OTHER] += count
    return [count for columns in sums for count in columns.values()]


def record(total: Sequence[float]) -> dict[str, Any]:
    """`comm_bytes` and `comm_calls` by "axis/purpose", from sums over ranks of what `taken` gave; zeros left out."""
    names = ["/".join(entry).replace(" ", "_") for entry in ENTRIES]
    halves = {"comm_bytes": total[: len(names)], "comm_calls": total[len(names) :]}
    record = {key: {n: int(c) for n, c in zip(names, half, strict=True) if c} for key, half in halves.items()}
    return {key: counts for key, counts in record.items() if counts}


class TransportChoice(Hook):
    """Gives `auto` its wire: that of a checkpoint of as many ranks, or one that is measured now. Collective.

    Says what is chosen for each kind among `asks`, with so many `spans` a rank of `sequence`. A run keeps the wire that
    it began with also where it goes back to a checkpoint.
    """

    key: ClassVar[str] = "wire"

    def __init__(
        self,
        recurrence: Any,
        asks: Sequence[Ask],
        groups: Groups,
        sequence: int,
        spans: int,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self._auto = recurrence if isinstance(recurrence, AutoTransport) and sequence > 1 else None
        self._asks, self._groups, self._sequence, self._spans = asks, groups, sequence, spans
        self._device, self._say, self._settled = device, say, False

    def state(self) -> dict[str, Any] | None:
        return None if self._auto is None else {"ranks": self._sequence, **self._auto.wire._asdict()}

    def load(self, state: dict[str, Any]) -> None:
        if self._auto is None or self._settled:
            return
        self._settled = True
        if again := state.get("ranks") == self._sequence:
            self._auto.wire = LinkCost(state["latency"], state["bandwidth"])
        else:
            groups, size = self._groups, self._sequence
            everyone = [tuple(range(first, first + size)) for first in range(0, groups.world, size)]
            groups.open(everyone)
            own = groups.comm(everyone[groups.rank // size])
            self._auto.wire = measure(own, groups.world_comm, self._device)
        self._say(_chosen(self._auto, self._asks, self._sequence, self._spans) + (", as before" if again else ""))


def _chosen(auto: AutoTransport, asks: Sequence[Ask], sequence: int, spans: int) -> str:
    """The line that says what is chosen, and from what."""
    kinds: dict[str, list[str]] = {}
    for ask in asks:
        if isinstance(ask, ScanCall) and not ask.serial:
            decay, state = (size * ask.itemsize for size in (ask.decay, ask.state))
            name = auto.choice(sequence, decay, state, ask.extent, spans)
            several = kinds.setdefault(ask.kind, [])
            several += [] if name in several else [name]
    latency, bandwidth = auto.wire
    chosen = ", ".join(f"{kind} by {' and '.join(names)}" for kind, names in kinds.items()) or "no recurrence"
    return (
        f"parallel.transport.recurrence=auto: {chosen} ({sequence} ranks, {spans} spans each, "
        f"{latency * 1e3:.3g} ms a message, {bandwidth / 1e6:.3g} MB/s)"
    )
