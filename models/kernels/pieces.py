"""The runs of documents within spans, and how the host knows them.

Whoever places a sequence knows where its documents begin before their positions go to the device. To read them back,
the host would wait for all that the device still has to do, so `know` notes the runs of a tensor of positions, or of
one that says where documents start, for as long as the tensor lives. Only a tensor that nobody has noted is read.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Piece(NamedTuple):
    """A run [begin, end) of one document's tokens within a span; `past` of its tokens came before the span."""

    begin: int
    end: int
    past: int


Pieces = list[list[Piece]]  # of each span

_KNOWN = WeakTensorKeyDictionary()


def know(x_BT: Tensor, pieces: Pieces) -> Tensor:
    """Notes the runs of x, positions or starts [B, T], and returns x. Nobody may write to x afterwards."""
    _KNOWN[x_BT] = pieces
    return x_BT


def known(x_BT: Tensor) -> Pieces | None:
    """The runs of x, where they have been noted."""
    pieces: Pieces | None = _KNOWN.get(x_BT)
    return pieces


def pieces_of(positions_BT: Tensor) -> Pieces:
    """The runs of each span, from positions within documents (0 starts a document)."""
    pieces = known(positions_BT)
    return read(positions_BT) if pieces is None else pieces


def read(positions_BT: Tensor) -> Pieces:
    """The same from the numbers alone, for which the host waits where they are on a device."""
    rows = []
    for positions in positions_BT.tolist():
        begins = [0, *(t for t in range(1, len(positions)) if positions[t] == 0)]
        ends = [*begins[1:], len(positions)]
        rows.append([Piece(b, e, positions[b]) for b, e in zip(begins, ends, strict=True)])
    return rows


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of the host on `device`, which the host does not wait for."""
    if device.type == "cpu":
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
