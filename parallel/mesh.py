"""Process groups: all ranks as one mesh for sharding, and the sequence groups that plans ask for."""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.collectives import LEDGER, Clock, Comm
from parallel.liveness import TIMEOUT
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
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def prepare(self, plan: Plan) -> None:
        self.open(group.ranks for micro in plan.micro_steps for group in micro.groups)

    def open(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Makes sequence groups. One of all ranks is not the world's: FSDP's collectives are that one's, and states
        cross beside them, in an order of their own."""
        for ranks in groups:
            if len(ranks) > 1 and ranks not in self._groups:
                group = dist.new_group(list(ranks), timeout=TIMEOUT)
                self._groups[ranks] = group
                if self.rank in ranks:
                    LEDGER.axes[group.group_name] = "sequence"

    def comm(self, ranks: tuple[int, ...]) -> Comm:
        """The communicator of a prepared sequence group that this rank belongs to."""
        return Comm(ranks, ranks.index(self.rank), self._groups[ranks] if len(ranks) > 1 else None, self.waiting)

    @property
    def world_comm(self) -> Comm:
        return Comm(tuple(range(self.world)), self.rank, dist.group.WORLD if self.world > 1 else None, self.waiting)
