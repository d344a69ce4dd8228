"""Placement: by hand where one can see the answer, and against every other layout of small random clusters."""

import itertools
import random

import pytest

from launch.cluster.placement import Node, groups, natural, order, place


def cluster(*slots: int) -> list[Node]:
    return [Node(f"gpu-{i}", f"10.0.0.{i}", n) for i, n in enumerate(slots, start=1)]


def mesh(**sizes: int) -> dict[str, int]:
    return {axis: sizes.get(axis, 1) for axis in ("pipeline", "data", "sequence", "expert", "tensor")}


def filled(placement) -> dict[str, int]:
    return {node.name: n for node, n in zip(placement.nodes, placement.filled, strict=True)}


def test_sequence_groups_stay_inside_a_node_and_data_groups_cross():
    placement = place(8, cluster(4, 4), mesh(data=4, sequence=2))
    assert placement.ranks == [(f"gpu-{n}", i) for n in (1, 2) for i in range(4)]
    assert placement.lines() == [
        "gpu-1  ranks 0-3",
        "gpu-2  ranks 4-7",
        "data x4: across nodes",
        "sequence x2: inside a node",
    ]


def test_a_sequence_group_larger_than_a_node_lies_over_neighbours():
    placement = place(32, cluster(8, 8, 8, 8, 8), mesh(data=2, sequence=16))
    assert filled(placement) == {f"gpu-{i}": 8 for i in range(1, 5)}
    assert placement.lines()[-1] == "sequence x16: over 2 neighbouring nodes"


def test_one_worker_on_one_machine():
    placement = place(1, [Node("this machine", "127.0.0.1", 1)], mesh())
    assert placement.lines() == ["this machine  rank 0"]


def test_machines_are_taken_in_natural_order_of_their_addresses():
    nodes = [Node(name, name, 2) for name in ("n10", "n9", "n2", "n1")]
    assert [node.name for node in place(8, nodes, mesh(data=8)).nodes] == ["n1", "n2", "n9", "n10"]
    by_address = [Node("a", "10.0.0.10", 1), Node("b", "10.0.0.9", 1)]
    assert [node.name for node in place(2, by_address, mesh(data=2)).nodes] == ["b", "a"]
    assert natural("n1") < natural("n2") < natural("n10") and natural("n01") != natural("n1")


def test_neighbours_are_preferred_and_the_fewest_nodes_used():
    placement = place(8, cluster(4, 2, 4, 4, 4), mesh(sequence=8))
    assert filled(placement) == {"gpu-3": 4, "gpu-4": 4}  # not gpu-1, whose neighbour is smaller
    assert filled(place(4, cluster(2, 2, 8), mesh(sequence=4))) == {"gpu-3": 4}


def test_nodes_are_equally_filled_when_they_can_be():
    assert filled(place(12, cluster(8, 8), mesh(data=12))) == {"gpu-1": 6, "gpu-2": 6}
    assert filled(place(24, cluster(7, 7, 7, 7), mesh(data=3, sequence=8))) == {f"gpu-{i}": 6 for i in range(1, 5)}


def test_a_sequence_group_inside_a_node_is_worth_another_node():
    assert filled(place(12, cluster(4, 4, 4, 4), mesh(data=4, sequence=3))) == {f"gpu-{i}": 3 for i in range(1, 5)}
    assert place(12, cluster(4, 4, 4), mesh(data=4, sequence=3)).lines()[-1] == (
        "sequence x3: over 1 to 2 neighbouring nodes"
    )


def test_unequal_slots_never_cut_a_tensor_group():
    placement = place(16, cluster(6, 8, 6), mesh(data=4, tensor=4))
    assert filled(placement) == {"gpu-1": 4, "gpu-2": 8, "gpu-3": 4}
    placement = place(16, cluster(9, 9), mesh(sequence=2, expert=2, tensor=4))
    assert filled(placement) == {"gpu-1": 8, "gpu-2": 8}
    assert placement.lines()[2:] == [
        "sequence x2: over 2 neighbouring nodes",
        "expert x2: inside a node",
        "tensor x4: inside a node",
    ]


@pytest.mark.parametrize(
    ("workers", "nodes", "sizes", "line"),
    [
        (8, (4, 4), {"tensor": 8}, "parallel.tensor=8: a group must fit inside a node; the largest has 4 workers "
         "(gpu-1: 4, gpu-2: 4)"),
        (8, (4, 4), {"expert": 4, "tensor": 2}, "parallel.expert=4: a group (8 ranks with the axes inside it) must fit "
         "inside a node; the largest has 4 workers (gpu-1: 4, gpu-2: 4)"),
        (12, (6, 6), {"data": 3, "tensor": 4}, "parallel.tensor=4: a group must fit inside a node; whole groups have "
         "room for 8 of cluster.workers=12 (gpu-1: 6, gpu-2: 6)"),
        (8, (4, 2), {"data": 8}, "cluster.workers=8: the cluster has room for 6 (gpu-1: 4, gpu-2: 2)"),
        (2, (), {"data": 2}, "cluster.workers=2: the cluster has room for 0 (no machines)"),
        (2, (0,), {"tensor": 2}, "cluster.workers=2: the cluster has room for 0 (gpu-1: 0)"),
        (20, (1,) * 11, {"data": 20}, "cluster.workers=20: the cluster has room for 11 (gpu-1: 1, gpu-2: 1, gpu-3: 1, "
         "gpu-4: 1, gpu-5: 1, gpu-6: 1, gpu-7: 1, gpu-8: 1, and 3 more)"),
        (6, (8,), {"data": 4}, "cluster.workers=6: must be the product of the mesh's sizes (pipeline 1 x data 4 x "
         "sequence 1 x expert 1 x tensor 1)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_costs_one_line(workers, nodes, sizes, line):
    with pytest.raises(ValueError) as raised:
        place(workers, cluster(*nodes), mesh(**sizes))
    assert str(raised.value) == line


def test_workers_agree_on_ranks_from_addresses_alone():
    members = [("10.0.0.10", "a", 1), ("10.0.0.2", "b", 0), ("10.0.0.10", "a", 0), ("10.0.0.2", "b", 1)]
    assert order(members) == [1, 3, 2, 0]
    assert order([("::1", "y", 0), ("::1", "x", 1), ("::1", "x", 0)]) == [2, 1, 0]  # two Rays on one machine
    placement = place(6, cluster(1, 2, 3), mesh(data=3, sequence=2))
    told = [(node.address, node.name, i) for node, n in zip(placement.nodes, placement.filled, strict=True)
            for i in range(n)]  # fmt: skip
    shuffled = random.Random(0).sample(told, len(told))
    ranked = [shuffled[i] for i in order(shuffled)]
    assert [(name, local) for _, name, local in ranked] == placement.ranks


def test_groups_of_an_axis_are_those_of_a_row_major_mesh():
    sizes = mesh(data=2, sequence=3, tensor=2)
    assert groups(sizes, "tensor") == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert groups(sizes, "sequence") == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    assert groups(sizes, "data") == [[i, i + 6] for i in range(6)]


def _groups(sizes: dict[str, int], axis: str) -> list[list[int]]:
    """Independently: by the coordinates of every rank."""
    at = list(sizes).index(axis)
    coordinates = list(itertools.product(*(range(n) for n in sizes.values())))
    found: dict[tuple, list[int]] = {}
    for rank, coordinate in enumerate(coordinates):
        found.setdefault(coordinate[:at] + coordinate[at + 1 :], []).append(rank)
    return sorted(found.values())


def _inside(filled: tuple[int, ...], sizes: dict[str, int], axis: str) -> bool:
    machine = [i for i, n in enumerate(filled) for _ in range(n)]
    return all(len({machine[rank] for rank in group}) == 1 for group in _groups(sizes, axis))


@pytest.mark.parametrize("seed", range(150))
def test_against_every_layout_of_a_small_cluster(seed):
    chance = random.Random(seed)
    slots = [chance.choice((1, 2, 3, 4, 4, 6)) for _ in range(chance.randint(1, 4))]
    sizes = mesh(**{axis: chance.choice((1, 1, 2, 3)) for axis in ("data", "sequence", "expert", "tensor")})
    workers = sizes["data"] * sizes["sequence"] * sizes["expert"] * sizes["tensor"]
    # Every way to fill the nodes, nodes with nobody left out; those that keep tensor and expert groups inside one.
    every = (f for f in itertools.product(*(range(n + 1) for n in slots)) if sum(f) == workers)
    legal = [f for f in every if _inside(f, sizes, "tensor") and _inside(f, sizes, "expert")]
    nodes = cluster(*slots)
    if not legal:
        with pytest.raises(ValueError):
            place(workers, chance.sample(nodes, len(nodes)), sizes)
        return
    placement = place(workers, chance.sample(nodes, len(nodes)), sizes)
    numbers = [nodes.index(node) for node in placement.nodes]
    assert numbers == sorted(numbers)
    found = tuple(placement.filled[numbers.index(i)] if i in numbers else 0 for i in range(len(slots)))
    assert found in legal and all(placement.filled)
    whole = [f for f in legal if _inside(f, sizes, "sequence")]
    assert not whole or found in whole
    best = whole or legal
    fewest = min(sum(n > 0 for n in f) for f in best)
    assert len(placement.filled) == fewest
    least = [f for f in best if sum(n > 0 for n in f) == fewest]
    equal = [f for f in least if len({n for n in f if n}) == 1]
    assert not equal or found in equal
    near = [f for f in equal if _reach(f) == fewest - 1]
    assert not near or found in near
    for axis in ("data", "sequence", "expert", "tensor"):
        assert sorted(groups(sizes, axis)) == _groups(sizes, axis)


def _reach(filled: tuple[int, ...]) -> int:
    used = [i for i, n in enumerate(filled) if n]
    return used[-1] - used[0]
