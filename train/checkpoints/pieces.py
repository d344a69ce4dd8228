"""Parameters of which a rank holds a piece, in checkpoints that know whole tensors alone.

FSDP shards a rank's piece as if it were a parameter of its own. Where that lies in the logical tensor follows from the
piece and the shard: some boxes, one a part of what lies side by side. A checkpoint is written and read by boxes, so
that it does not know how a run was divided, and any division reads what any other has written.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.matrix_owners import local
from parallel.tensor import Division, TensorPiece


class LogicalTensor:
    """A tensor of the logical `shape`, of which this rank holds the boxes `held`: by offset, views of its memory.

    What torch's checkpoints ask of a tensor is answered in their terms.
    """

    def __init__(self, piece: TensorPiece, rank: int, value: Tensor):
        self.shape, self.held = torch.Size(piece.shape), dict(_boxes(piece, rank, value))
        self.properties = TensorProperties.create_from_tensor(local(value))

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
    """A flat state dict with those of its tensors as logical ones that lie as a divided parameter does: the parameter's
    name is part of their path, and they have its shape."""
    if division is None:
        return state
    whole = dict(state)
    for key, value in state.items():
        piece = next((division.pieces[p] for p in paths[key] if p in division.pieces), None)
        if piece is not None and piece.along is not None and isinstance(value, Tensor):
            if tuple(value.shape) == piece.local_shape(division.rank):
                whole[key] = LogicalTensor(piece, division.rank, value)
    return whole
