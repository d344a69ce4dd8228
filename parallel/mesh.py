"""Process groups: the slices of the mesh that weights are sharded over, and the sequence groups that plans ask for."""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.collectives import LEDGER, Clock, Comm
from parallel.liveness import TIMEOUT
from parallel.schedule.mesh import PLANNED, Mesh
from parallel.schedule.plan import Plan

DENSE = ("data", "expert", "sequence")  # what most parameters are sharded over, flattened
EXPERTS = ("data", "sequence")  # and those of experts, of which each rank along `expert` has its own


class Meshes:
    """The slices of one mesh, with their process groups. Opening one is collective over the whole world, so every rank
    makes its Meshes at the same point, and asks for slices and communicators in the same order."""

    def __init__(self, mesh: Mesh, device: torch.device, *, waiting: Clock = nullcontext):
        if mesh.world != dist.get_world_size():
            raise ValueError(f"a mesh of {mesh} has {mesh.world} ranks, the world {dist.get_world_size()}")
        self.mesh, self.device, self.waiting = mesh, device, waiting
        self.place = mesh.coordinates(dist.get_rank())
        self._groups: dict[str, dist.ProcessGroup] = {}

    @cached_property
    def dense(self) -> DeviceMesh:
        """The ranks that parameters, gradients and optimizer state are sharded over: data, expert and sequence ranks,
        flat; under `replicate`, a mesh of two dimensions."""
        return self._sharding(DENSE, "dense")

    @cached_property
    def experts(self) -> DeviceMesh:
        """The same for parameters of experts: data and sequence ranks, flat, then `expert`, along which they are cut.
        Under `replicate`, that comes first."""
        names = ["replicate"] * (self.mesh.replicate > 1) + ["experts", "expert"]
        groups = [self._group(name, *(EXPERTS if name == "experts" else (name,))) for name in names]
        sizes = self.mesh.sizes
        ranks = torch.tensor(self.mesh.group(dist.get_rank(), "replicate", *DENSE))
        ranks = ranks.view(sizes["replicate"], *(sizes[name] for name in DENSE)).movedim(2, -1).flatten(1, 2)
        ranks = ranks if self.mesh.replicate > 1 else ranks.squeeze(0)
        return DeviceMesh.from_group(groups, self.device.type, mesh=ranks, mesh_dim_names=tuple(names))

    @property
    def alike(self) -> DeviceMesh:
        """The ranks of it that hold the same experts."""
        names = self.experts.mesh_dim_names
        assert names is not None
        return self.experts[names[:-1] if len(names) > 2 else names[0]]

    def comm(self, dimension: str) -> Comm:
        """This rank's group along one dimension, as `tensor` or `expert`."""
        ranks = self.mesh.group(dist.get_rank(), dimension)
        group = self._group(dimension, dimension) if len(ranks) > 1 else None
        return Comm(ranks, self.place[dimension], group, self.waiting)

    def copies(self, count: int) -> Comm:
        """The communicator of `count` tensor ranks in a row, this one among them."""
        if count == self.mesh.tensor:
            return self.comm("tensor")
        tensor = self.mesh.groups("tensor")
        rows = [group[i : i + count] for group in tensor for i in range(0, len(group), count)]
        ranks = next(row for row in rows if dist.get_rank() in row)
        return Comm(ranks, ranks.index(dist.get_rank()), self._opened("tensor", f"tensor/{count}", rows))

    def _sharding(self, dimensions: tuple[str, ...], name: str) -> DeviceMesh:
        device, rank = self.device.type, dist.get_rank()
        ranks = self.mesh.group(rank, *dimensions)
        if self.mesh.replicate == 1:
            if len(ranks) == self.mesh.world:
                return init_device_mesh(device, (self.mesh.world,), mesh_dim_names=(name,))
            return DeviceMesh.from_group(self._group(name, *dimensions), device, mesh_dim_names=(name,))
        groups = [self._group("replicate", "replicate"), self._group(name, *dimensions)]
        replicas = torch.tensor(self.mesh.group(rank, "replicate", *dimensions)).view(self.mesh.replicate, -1)
        return DeviceMesh.from_group(groups, device, mesh=replicas, mesh_dim_names=("replicate", name))

    def _group(self, name: str, *dimensions: str) -> dist.ProcessGroup:
        """This rank's group along these dimensions, under a name of the ledger."""
        return self._opened(name, name, self.mesh.groups(*dimensions))

    def _opened(self, axis: str, key: str, groups: Iterable[tuple[int, ...]]) -> dist.ProcessGroup:
        """This rank's of some groups, made on all ranks when first asked for; `axis`: its name in the ledger."""
        if key not in self._groups:
            for ranks in groups:
                group = dist.new_group(list(ranks), timeout=TIMEOUT)
                if dist.get_rank() in ranks:
                    self._groups[key] = group
                    LEDGER.axes[group.group_name] = axis
        return self._groups[key]


def everyone(device: torch.device) -> Meshes:
    """The mesh of a world that shares out nothing but sequences."""
    return Meshes(Mesh(sequence=dist.get_world_size()), device)


class Groups:
    """Communicators by rank tuple, made when a plan first needs them and kept.

    Ranks are those of plans (`Mesh.plan_rank`): `rank` is this process's, `world` how many there are. All tensor ranks
    and stages of a plan's rank do as it says, each with those of the other plan ranks that stand where it stands.
    `first`: whether this process is the one that writes and speaks for all. `counts`: whether what it computes is to be
    counted: of a tensor group, whose ranks compute the same, the first is. `speakers`: the process that counts, of each
    rank of a plan.

    Making a group is collective over the whole world, so every rank prepares every plan, in the same order.
    """

    def __init__(self, mesh: Mesh | None = None, *, waiting: Clock = nullcontext):
        self.mesh = Mesh(sequence=dist.get_world_size()) if mesh is None else mesh
        self.first = dist.get_rank() == 0
        self.rank, self.world = self.mesh.plan_rank(dist.get_rank()), self.mesh.planned
        self.speakers = self.mesh.groups(*PLANNED)[0]
        self.counts = self.mesh.coordinates(dist.get_rank())["tensor"] == 0
        self.waiting = waiting
        self._planes = self.mesh.groups(*PLANNED)
        self._plane = self.mesh.group(dist.get_rank(), *PLANNED)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._all = dist.group.WORLD if self.world == self.mesh.world else self._open(tuple(range(self.world)), "plan")
        self._stages = self._all if self.mesh.pipeline == 1 else self._open_several("pipeline", *PLANNED)
        apart = self.mesh.pipeline > 1 and self.mesh.tensor > 1
        self._alike = self._open_several(*PLANNED, "tensor") if apart else self._all

    def prepare(self, plan: Plan) -> None:
        self.open(group.ranks for micro in plan.micro_steps for group in micro.groups)

    def open(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Makes sequence groups. One of all ranks is not the world's: FSDP's collectives are that one's, and states
        cross beside them, in an order of their own."""
        for ranks in groups:
            if len(ranks) > 1 and ranks not in self._groups:
                self._groups[ranks] = self._open(ranks, "sequence")

    def _open(self, ranks: tuple[int, ...], name: str) -> dist.ProcessGroup:
        """One group for each stage and tensor rank; returns this process's, or what stands for one it is not in."""
        mine = None
        for plane in self._planes:
            group = dist.new_group([plane[rank] for rank in ranks], timeout=TIMEOUT)
            if plane == self._plane:
                mine = group
                if self.rank in ranks:
                    LEDGER.axes[group.group_name] = name
        assert mine is not None
        return mine

    def comm(self, ranks: tuple[int, ...]) -> Comm:
        """The communicator of a prepared sequence group that this rank belongs to."""
        return self._comm(ranks, self._groups[ranks] if len(ranks) > 1 else None)

    @property
    def all_comm(self) -> Comm:
        """The communicator of all processes."""
        ranks = tuple(range(self.mesh.world))
        return Comm(ranks, dist.get_rank(), dist.group.WORLD if len(ranks) > 1 else None, self.waiting)

    @property
    def world_comm(self) -> Comm:
        """The communicator of all ranks of a plan."""
        return self._comm(tuple(range(self.world)), self._all if self.world > 1 else None)

    @property
    def stages_comm(self) -> Comm:
        """The communicator of all ranks of a plan in all stages of a pipeline: what sums over layers is summed by."""
        if self.mesh.pipeline == 1:
            return self.world_comm
        ranks = self.mesh.group(dist.get_rank(), "pipeline", *PLANNED)
        return Comm(ranks, ranks.index(dist.get_rank()), self._stages, self.waiting)

    @property
    def layers_comm(self) -> Comm:
        """The communicator of all processes that share out the same layers: those of a stage, or all."""
        if self.mesh.pipeline == 1:
            return self.all_comm
        if self.mesh.tensor == 1:
            return self.world_comm
        ranks = self.mesh.group(dist.get_rank(), *PLANNED, "tensor")
        return Comm(ranks, ranks.index(dist.get_rank()), self._alike, self.waiting)

    def _open_several(self, *dimensions: str) -> dist.ProcessGroup:
        """This process's group along some dimensions."""
        groups = self.mesh.groups(*dimensions)
        if len(groups) == 1:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        opened = {ranks: dist.new_group(list(ranks), timeout=TIMEOUT) for ranks in groups}
        return opened[self.mesh.group(dist.get_rank(), *dimensions)]

    def _comm(self, ranks: tuple[int, ...], group: dist.ProcessGroup | None) -> Comm:
        return Comm(tuple(self._plane[rank] for rank in ranks), ranks.index(self.rank), group, self.waiting)
