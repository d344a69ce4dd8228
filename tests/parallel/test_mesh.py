"""The arithmetic of the mesh, and the groups that it opens."""

from itertools import product

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Groups, Meshes
from parallel.schedule.mesh import DIMENSIONS, Mesh
from parallel.schedule.static import Static
from train.parallel_settings import ParallelSettings

EVERY = Mesh(pipeline=2, replicate=3, data=2, expert=2, sequence=2, tensor=3)


def test_ranks_and_places_are_each_others_inverse():
    places = list(product(*(range(size) for size in EVERY.sizes.values())))
    assert EVERY.world == len(places) == 144
    for rank, place in enumerate(places):  # the outermost first: this is the order of rank numbers
        assert EVERY.coordinates(rank) == dict(zip(DIMENSIONS, place, strict=True))
        assert EVERY.rank(EVERY.coordinates(rank)) == rank


def test_tensor_groups_are_neighbours_and_sequence_groups_have_their_stride():
    mesh = Mesh(data=2, sequence=2, tensor=2)
    assert mesh.groups("tensor") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.groups("sequence") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.groups("data", "sequence") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert mesh.group(5, "data", "expert", "sequence") == (1, 3, 5, 7)
    assert str(mesh) == "data 2 × sequence 2 × tensor 2" and str(Mesh()) == "one rank"


@pytest.mark.parametrize("names", [("tensor",), ("expert",), ("data", "sequence"), ("replicate", "data"), DIMENSIONS])
def test_groups_partition_the_world_and_differ_along_their_dimensions_alone(names):
    groups = EVERY.groups(*names)
    assert sorted(rank for group in groups for rank in group) == list(range(EVERY.world))
    for group in groups:
        assert list(group) == sorted(group)
        others = {tuple(v for k, v in EVERY.coordinates(rank).items() if k not in names) for rank in group}
        assert len(others) == 1


def test_the_ranks_of_a_tensor_group_and_all_stages_are_one_rank_of_a_plan():
    assert EVERY.planned == 24 and EVERY.split == (12, 2)
    for rank in range(EVERY.world):
        place = EVERY.coordinates(rank)
        same = {"pipeline": 1 - place["pipeline"], "tensor": (place["tensor"] + 1) % 3}
        assert EVERY.plan_rank(rank) == EVERY.plan_rank(EVERY.rank({**place, **same}))
    assert [EVERY.plan_rank(rank) for rank in EVERY.groups("replicate", "data", "expert", "sequence")[0]] == list(
        range(24)
    )


@pytest.mark.parametrize(
    ("sizes", "workers", "want"),
    [
        ({}, 4, Mesh(sequence=4)),
        ({"data": 2}, 4, Mesh(data=2, sequence=2)),
        ({"sequence": 2}, 8, Mesh(data=4, sequence=2)),
        ({"data": 2, "sequence": 2}, 4, Mesh(data=2, sequence=2)),
    ],
)
def test_sizes_that_are_not_given_take_what_is_left(sizes, workers, want):
    assert ParallelSettings(**sizes).mesh(workers) == want


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({"data": 3}, "parallel.data=3: must divide cluster.workers=8"),
        ({"data": 0}, "parallel.data=0: must divide"),
        ({"data": 2, "sequence": 2}, "parallel.data=2 × parallel.sequence=2: is 4, must be cluster.workers=8"),
    ],
)
def test_a_mesh_that_does_not_multiply_to_the_workers_is_refused_with_its_factors(sizes, line):
    with pytest.raises(ValueError, match=line):
        ParallelSettings(**sizes).mesh(8)


def opened() -> dict[str, list[int]]:
    """The ranks of what this rank opens, each found out by a collective of that group."""
    mesh = Mesh(replicate=2, sequence=1, tensor=2)
    meshes, groups = Meshes(mesh, torch.device("cpu")), Groups(mesh)
    found = {"dense": meshes.dense.mesh.flatten().tolist()}
    plan = Static().plan(0, [8, 8], data=2, sequence=1)
    groups.prepare(plan)
    groups.open([(0, 1)])
    comms = {"tensor": meshes.comm("tensor"), "plan": groups.world_comm, "sequence": groups.comm((0, 1))}
    for name, sizes in {"tensor": {"tensor": 2}, "sequence": {"sequence": 2}}.items():
        comms[f"layers, {name}"] = Groups(Mesh(pipeline=2, **sizes)).layers_comm
    own = torch.tensor([float(dist.get_rank())])
    for name, comm in comms.items():
        found[name] = comm.all_gather(own, purpose="test").flatten().int().tolist()
        assert found[name] == list(comm.ranks) and comm.ranks[comm.rank] == dist.get_rank()
    return found


@pytest.mark.dist
def test_opened_groups_are_those_of_the_arithmetic(run):
    for rank, found in enumerate(run(4, opened)):
        tensor, plane = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        stage = {"layers, tensor": tensor, "layers, sequence": tensor}  # ranks 0 and 1 have the first layers
        assert found == {"dense": plane, "tensor": tensor, "plan": plane, "sequence": plane, **stage}
