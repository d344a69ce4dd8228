"""Parameters of which a rank holds a piece or a stretch, in checkpoints that know whole tensors alone.

FSDP shards a rank's piece as if it were a parameter of its own. Where that lies in the logical tensor follows from the
piece and the shard: some boxes, one a part of what lies side by side. Other engines lay weights end to end and cut the
row among ranks: such a stretch of a tensor is some boxes too. A checkpoint is written and read by boxes, so that it
does not know how a run was divided, and any division and any engine reads what any other has written.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.shards import local
from parallel.tensor import Division, TensorPiece


class LogicalTensor:
    """A tensor of the logical `shape`, of which this rank holds the boxes `held`: by offset, views of its memory.

    What torch's checkpoints ask of a tensor is answered in their terms.
    """

    def __init__(self, shape: Sequence[int], held: Mapping[tuple[int, ...], Tensor], properties: TensorProperties):
        self.shape, self.held, self.properties = torch.Size(shape), dict(held), properties

    @classmethod
    def of_piece(cls, piece: TensorPiece, rank: int, value: Tensor) -> "LogicalTensor":
        """The tensor of which a tensor rank's piece is sharded as `value` is."""
        return cls(piece.shape, dict(_boxes(piece, rank, value)), TensorProperties.create_from_tensor(local(value)))

    @classmethod
    def of_stretch(cls, shape: Sequence[int], begin: int, flat: Tensor) -> "LogicalTensor":
        """The tensor whose elements from `begin` on, row after row, are those of `flat`, [N]."""
        held, at = {}, 0
        for offset, size in stretch_boxes(tuple(shape), begin, begin + flat.numel()):
            count = math.prod(size)
            held[offset] = flat[at : at + count].view(size)
            at += count
        return cls(shape, held, TensorProperties.create_from_tensor(flat))

    def size(self) -> torch.Size:
        return self.shape

    def at(self, index: MetadataIndex) -> Tensor:
        """The box that torch knows by this index."""
        assert index.offset is not None
        return self.held[tuple(index.offset)]

    def __create_write_items__(self, name: str, value: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(offset, box), self.properties, self.shape),
            )
            for offset, box in self.held.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(offset, box) for offset, box in self.held.items()]


def _chunk(offset: tuple[int, ...], box: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offset), box.size())


def stretch(shape: Sequence[int], begin: int, flat: Tensor) -> Tensor:
    """`flat`, [N], for a state dict, where it is the elements from `begin` on of a tensor of this shape. It says so by
    an attribute: torch takes state dicts of tensors alone."""
    flat.logical = LogicalTensor.of_stretch(shape, begin, flat)  # type: ignore[attr-defined]
    return flat


def stretch_boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes, offset and size, that elements [begin, end) of a tensor are, row after row and in their order."""
    if begin >= end:
        return
    if len(shape) < 2:
        yield ((begin,), (end - begin,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:  # within one row
        first = last = end // row
        heads = [(last, begin - last * row, end - last * row)]
        tails = []
    else:
        heads = [(first - 1, begin - (first - 1) * row, row)] if begin < first * row else []
        tails = [(last, 0, end - last * row)] if end > last * row else []
    for n, low, high in heads:
        yield from _in_row(n, shape, low, high)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for n, low, high in tails:
        yield from _in_row(n, shape, low, high)


def _in_row(n: int, shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, size in stretch_boxes(shape[1:], begin, end):
        yield (n, *offset), (1, *size)


def _boxes(piece: TensorPiece, rank: int, value: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    own, offset = local(value), (0,) * value.dim()
    if isinstance(value, DTensor):
        _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    assert piece.along is not None
    boxes, at, along = list[tuple[tuple[int, ...], Tensor]](), 0, piece.along
    for begin, end in piece.segments(rank):
        first, last = max(at, offset[along]), min(at + end - begin, offset[along] + own.shape[along])
        if first < last and own.numel():
            place = (*offset[:along], begin + first - at, *offset[along + 1 :])
            boxes.append((place, own.narrow(along, first - offset[along], last - first)))
        at += end - begin
    return boxes


def logical(state: dict[str, Any], paths: Mapping[str, tuple[Any, ...]], division: Division | None) -> dict[str, Any]:
    """A flat state dict with those of its tensors as logical ones that are a `stretch`, or lie as a divided parameter
    does: the parameter's name is part of their path, and they have its shape."""
    whole = dict(state)
    for key, value in state.items():
        if (own := getattr(value, "logical", None)) is not None:
            whole[key] = own
        if division is None:
            continue
        piece = next((division.pieces[p] for p in paths[key] if p in division.pieces), None)
        if piece is not None and piece.along is not None and isinstance(value, Tensor):
            if tuple(value.shape) == piece.local_shape(division.rank):
                whole[key] = LogicalTensor.of_piece(piece, division.rank, value)
    return whole
