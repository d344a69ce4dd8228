"""Builds this rank's inputs from a plan's group: its tokens, its targets, and the sequence that joins them."""

from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models.kernels.pieces import Piece, know, upload
from models.mtp import Ahead
from models.sequence import DocumentKey, IndexLosses, Memory, Sequence, Whole
from parallel.collectives import Comm
from parallel.schedule.plan import Group
from parallel.sequence.attention import Keys
from parallel.sequence.span_layout import SpanLayout
from parallel.sequence.spread import Spread
from parallel.sequence.states import Transport

NO_TARGET = -100
COLUMNS = {"tokens": np.int64, "targets": np.int64, "positions": np.int64, "counted": np.bool_}


class PackedSequence(Protocol):
    """A packed sequence of the batch, int64 [L] each: tokens, targets (-100: none), positions in the document. counted,
    bool [L]: False for a token that only fills a place."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def targets(self) -> np.ndarray: ...
    @property
    def positions(self) -> np.ndarray: ...
    @property
    def counted(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Placed:
    """One micro-step of one rank: tokens and targets [B, T] int64, B spans of T tokens. ahead: of the model's modules
    of multi-token prediction, None where these do not run."""

    tokens: Tensor
    targets: Tensor
    seq: Sequence
    ahead: Ahead | None = None


def place(
    group: Group,
    batch: Listed[PackedSequence],
    comm: Comm,
    *,
    device: torch.device,
    recurrence: Transport,
    attention: Keys,
    step: int | None = None,
    memory: Memory | None = None,
    shapes: tuple[tuple[int, int], ...] = (),
    mtp: int = 0,
    index_weight: float = 0.0,
) -> Placed:
    """This rank's part of a group's packed sequence; a rank without a span gets one masked token behind its end.

    `step` is that of the training; None where nothing is to be random. `memory`: the group's spans are one of several
    spans in time, see `parallel.schedule.time_spans`; what it leaves to the next and has from the one before is there.
    shapes: of what all ranks compute at the same time (`models.sequence`). mtp: modules that predict tokens ahead.
    index_weight: `models.sequence.IndexLosses.weight`.
    Raises ValueError for a sequence that begins inside a document: it would be one with what is joined before it.
    """
    tokens, targets, positions, counted = (
        np.concatenate([np.empty(0, dtype), *(getattr(batch[s], name) for s in group.sequences)])
        for name, dtype in COLUMNS.items()
    )
    length, idle = len(tokens), sum(not held for held in group.spans)
    begins = np.cumsum([0, *(len(batch[s].tokens) for s in group.sequences)])[:-1]
    if positions[begins].any():
        raise ValueError(f"sequences {group.sequences}: each must begin with a document's first token")
    tokens = np.concatenate((tokens, np.zeros(idle, np.int64)))
    targets = np.concatenate((targets, np.full(idle, NO_TARGET)))
    positions = np.concatenate((positions, np.zeros(idle, np.int64)))
    counted = np.concatenate((counted, np.zeros(idle, bool)))
    starting = positions == 0
    starting[length + 1 :] = False  # the masked tokens share one document that nobody counts
    documents = starting.cumsum() - 1

    spans, behind = [], length
    for held in group.spans:
        spans.append(held or ((behind, behind + 1),))
        behind += not held
    mine = spans[comm.rank]

    def rows(values: np.ndarray) -> Tensor:
        return upload(torch.from_numpy(np.stack([values[begin:end] for begin, end in mine])), device)

    where: dict[str, Any] = {
        "positions": know(rows(positions), [_pieces(positions[begin:end]) for begin, end in mine]),
        "documents": rows(documents),
        "num_documents": int(documents[-1]) + 1,
        "counted": rows(counted),
        "identities": None if step is None else _identities(group, batch, step, idle),
        "memory": memory,
        "firsts": tuple(int(documents[begin]) for begin, _ in mine),
        "shapes": shapes,
        "index_losses": IndexLosses(index_weight),
    }
    seq: Sequence
    if comm.size == 1 and len(mine) == 1:
        seq = Whole(**where)
    else:
        seq = Spread(
            **where,
            chain=SpanLayout(comm, tuple(spans), tuple(np.flatnonzero(starting).tolist())),
            recurrence=recurrence,
            attention=attention,
        )
    return Placed(rows(tokens), rows(targets), seq, _ahead(tokens, targets, positions, mtp, rows) if mtp else None)


def shifted(values: np.ndarray, positions: np.ndarray, by: int, missing: int) -> np.ndarray:
    """The value that each token's document has `by` tokens on, [L]; `missing` where the document has ended."""
    there = np.full_like(values, missing)
    inside = positions[by:] == positions[:-by] + by
    there[:-by][inside] = values[by:][inside]
    return there


def targets_ahead(batch: Listed[PackedSequence], mtp: int) -> list[int]:
    """The targets of a batch, for each module of multi-token prediction."""
    shifts = [[shifted(s.targets, s.positions, k + 1, NO_TARGET) for s in batch] for k in range(mtp)]
    return [sum(int(np.count_nonzero(targets != NO_TARGET)) for targets in each) for each in shifts]


def _ahead(
    tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray, mtp: int, rows: Callable[[np.ndarray], Tensor]
) -> Ahead:
    """The tokens ahead of this rank's: found in the whole packed sequence, since they may be another rank's."""
    shifts = range(1, mtp + 1)
    return Ahead(
        torch.stack([rows(shifted(tokens, positions, k, -1)) for k in shifts]),
        torch.stack([rows(shifted(targets, positions, k, NO_TARGET)) for k in shifts]),
    )


def _pieces(positions: np.ndarray) -> list[Piece]:
    """The runs of a span, from its positions."""
    begins = [0, *(np.flatnonzero(positions[1:] == 0) + 1).tolist()]
    past = positions[begins].tolist()
    return [Piece(b, e, p) for b, e, p in zip(begins, [*begins[1:], len(positions)], past, strict=True)]


def _identities(group: Group, batch: Listed[PackedSequence], step: int, idle: int) -> list[DocumentKey]:
    """Keys of every document of the group in order, and of the one that masked tokens share."""
    columns = []
    for s in group.sequences:
        starts = np.flatnonzero(batch[s].positions == 0)
        lengths = np.diff(starts, append=len(batch[s].positions))
        origin = getattr(batch[s], "origin", None)  # a piece keeps the name that it has in its packed sequence
        number, first = (s, 0) if origin is None else origin[:2]
        columns += [DocumentKey(step, number, first + index, length) for index, length in enumerate(lengths.tolist())]
    return [*columns, DocumentKey(step, len(batch), 0, idle)] if idle else columns
