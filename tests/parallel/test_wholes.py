"""Many tensors made whole together are what each is alone, whatever divides them."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from parallel.matrix_owners import whole, wholes

pytestmark = pytest.mark.dist

SHAPES = [(7, 3), (2,), (1, 5), (8, 2, 2), (3, 0)]  # rows that do not divide, fewer rows than ranks, none at all


def differing() -> list[tuple[str, int]]:
    """The tensors that are others than by themselves."""
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    layouts = {
        "rows": (line, [Shard(0)]),
        "rows of replicas": (square, [Replicate(), Shard(0)]),
        "replicas of rows": (square, [Shard(0), Replicate()]),
        "rows twice": (square, [Shard(0), Shard(0)]),
        "columns": (line, [Shard(1)]),
        "copies": (line, [Replicate()]),
    }
    tensors = {}
    for i, shape in enumerate(SHAPES):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(torch.float64 if i % 2 else torch.float32)
        tensors["plain", i] = x
        for name, (mesh, placements) in layouts.items():
            if name != "columns" or len(shape) > 1:
                tensors[name, i] = distribute_tensor(x, mesh, placements, src_data_rank=None)
    found = wholes(tensors)
    assert list(found) == list(tensors)
    return [
        name for name, x in tensors.items() if not torch.equal(found[name], whole(x)) or found[name].shape != x.shape
    ]


def test_together_they_are_what_each_is_alone(run):
    assert run(4, differing) == [[]] * 4
