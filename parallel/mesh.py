"""Process groups: all ranks as one mesh for sharding, and the sequence groups that plans ask for."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.collectives import Clock, Comm
from parallel.schedule.plan import Plan


def everyone(device: torch.device) -> DeviceMesh:
    """All data × sequence ranks, flat: what parameters, gradients and optimizer state are sharded over."""
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("everyone",))


class Groups:
    """Communicators by rank tuple, made when a plan first needs them and kept.

    Making a group is collective over the whole world, so every rank prepares every plan, in the same order.
    """

    def __init__(self, *, waiting: Clock = nullcontext):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.waiting = waiting
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(range(self.world)): dist.group.WORLD}

    def prepare(self, plan: Plan) -> None:
        for micro in plan.micro_steps:
            for group in micro.groups:
                if len(group.ranks) > 1 and group.ranks not in self._groups:
                    self._groups[group.ranks] = dist.new_group(list(group.ranks))

    def comm(self, ranks: tuple[int, ...]) -> Comm:
        """The communicator of a prepared group that this rank belongs to."""
        return Comm(ranks, ranks.index(self.rank), self._groups[ranks] if len(ranks) > 1 else None, self.waiting)

    @property
    def world_comm(self) -> Comm:
        return self.comm(tuple(range(self.world)))
