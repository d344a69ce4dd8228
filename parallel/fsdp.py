"""Fully sharded data parallelism (FSDP2) over all data × sequence ranks, gradients summed."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from parallel.collectives import LEDGER, all_gather_into, reduce_scatter_into
from parallel.liveness import HERE, Wait
from parallel.schedule.comm_volume import GradientFormat
from parallel.shards import local


def shard(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool,
    on_host: bool = False,
    gradients: GradientFormat = "high",
) -> None:
    """Shards each block, then the rest with the root, over `mesh`; of two dimensions, the first has copies of the
    shards, whose gradients are summed (hybrid sharding). `on_host`: shards live there, gradients too. Weights
    that a block does not let go after its forward pass, and always those of the root, stay gathered until the step's
    last backward pass (`communicate_gradients`). `gradients`: bf16 rounds each rank's part of them for its way to
    another rank; sums over copies of shards are as wide as ever."""
    policy = CPUOffloadPolicy() if on_host else OffloadPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, offload_policy=policy)
        block.stays = not reshard_after_forward  # type: ignore[assignment]
    fully_shard(model, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
    model.stays = True  # type: ignore[assignment]
    sum_gradients(model)
    count(model, mesh, gradients)


def shard_experts(
    experts: list[nn.Module], mesh: DeviceMesh, *, reshard_after_forward: bool, on_host: bool = False
) -> None:
    """Shards experts that are cut over ranks, over those that hold the same; before the rest of the model."""
    policy = CPUOffloadPolicy() if on_host else OffloadPolicy()
    for each in experts:
        fully_shard(each, mesh=mesh, reshard_after_forward=reshard_after_forward, offload_policy=policy)
        each.stays = not reshard_after_forward  # type: ignore[assignment]


class Counted:
    """FSDP's own collectives, done as it does them, for the weights of one `layer`."""

    def __init__(self, layer: str):
        self.layer = layer

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @staticmethod
    def count(group: dist.ProcessGroup, purpose: str, received: int) -> None:
        if group.size() > 1:
            LEDGER.add(group.group_name, purpose, received)


class CountedGather(Counted):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        self.count(group, "weights", output_tensor.nbytes - input_tensor.nbytes)
        with HERE.waiting(Wait(self.layer, "weights", "all-gather")):
            return all_gather_into(output_tensor, input_tensor, group=group, async_op=async_op)


class CountedScatter(Counted):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        self.count(group, "weights gradient", input_tensor.nbytes - output_tensor.nbytes)
        with HERE.waiting(Wait(self.layer, "weights gradient", "reduce-scatter")):
            return reduce_scatter_into(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


class RoundedScatter(CountedScatter):
    """Parts of gradients that travel in bf16, all to all, and are added up where they arrive, in the dtype that they
    had. A reduction in bf16 would round after each of the additions, P - 1 times; here each part is rounded once."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        ranks, few = group.size(), input_tensor.to(torch.bfloat16)
        parts = torch.empty_like(few)
        self.count(group, "weights gradient", few.nbytes - few.nbytes // ranks)
        with HERE.waiting(Wait(self.layer, "weights gradient", "all-to-all")):
            dist.all_to_all_single(parts, few, group=group)
        torch.sum(parts.view(ranks, -1), 0, dtype=output_tensor.dtype, out=output_tensor)


class CountedReduce(Counted):
    """A count of FSDP's all-reduce over the copies of the shards in `group`."""

    def __init__(self, layer: str, group: dist.ProcessGroup):
        super().__init__(layer)
        self.group = group

    def __call__(self, reduced: Tensor) -> None:
        ranks = self.group.size()
        self.count(self.group, "weights gradient", 2 * (ranks - 1) * reduced.nbytes // ranks)


def count(model: nn.Module, mesh: DeviceMesh, gradients: GradientFormat = "high") -> None:
    """Enters what FSDP gathers and reduces into the ledger. mesh, gradients: as in `shard`."""
    copies = mesh.get_group(0) if mesh.ndim > 1 else None
    scatter = RoundedScatter if gradients == "bf16" else CountedScatter
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(CountedGather(name))  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(scatter(name))  # type: ignore[arg-type]
            if copies is not None:
                module.set_all_reduce_hook(CountedReduce(name, copies))


def sum_gradients(model: nn.Module) -> None:
    """The one place that sets how gradients are reduced: a sum. The loss is already divided by the global token count.

    A true sum, and not a mean with factor 1: on gloo the divide factor alone fails in fp32 where fp64 passes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def communicate_gradients(model: nn.Module, last: bool) -> None:
    """Gradients of a step's micro-steps accumulate unsharded; only the last one reduces them.

    Weights that stay gathered behind a forward pass stay so until then, too: no rank changes them before, and their
    room was there at the end of the forward pass anyway. So a micro-step more gathers nothing more.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_backward(last or not getattr(module, "stays", False), recurse=False)


def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over all tensors together, sharded over one mesh or several, the same plain scalar on every rank."""
    totals = [_of_one_mesh(several) for several in by_mesh(tensors) or [tensors]]
    return totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack(totals))


def _of_one_mesh(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over tensors that are sharded over the same dimensions of one mesh."""
    first = tensors[0] if tensors else None
    if isinstance(first, DTensor) and first.device_mesh.ndim > 1:
        # torch would reduce each tensor's norm over each dimension by itself, and warn of it.
        square = nn.utils.get_total_norm([local(x) for x in tensors]).square()
        for dim, placement in enumerate(first.placements):
            if not placement.is_replicate():
                dist.all_reduce(square, group=first.device_mesh.get_group(dim))
        return square.sqrt()
    if isinstance(first, DTensor) and first.placements == (Shard(0),) and len({x.dtype for x in tensors}) == 1:
        # As torch has it, bit for bit, without its search for the placement of each tensor's norm.
        squares = torch.stack(torch._foreach_norm([local(x) for x in tensors])).square()
        dist.all_reduce(squares, group=first.device_mesh.get_group())
        return torch.linalg.vector_norm(squares.sqrt())
    total = nn.utils.get_total_norm(tensors)
    return total.full_tensor() if isinstance(total, DTensor) else total


def by_mesh(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors of each mesh, in their order: an operator over many takes those of one alone."""
    groups: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())
