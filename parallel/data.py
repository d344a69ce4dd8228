"""Fully sharded data parallelism (FSDP2) over all data × sequence ranks, gradients summed."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard


def shard(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool,
    on_host: bool = False,
) -> None:
    """Shards each block, then the rest with the root, over `mesh`; `on_host`: shards live there, gradients too."""
    policy = CPUOffloadPolicy() if on_host else OffloadPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, offload_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
    sum_gradients(model)


def sum_gradients(model: nn.Module) -> None:
    """The one place that sets how gradients are reduced: a sum. The loss is already divided by the global token count.

    A true sum, and not a mean with factor 1: on gloo the divide factor alone fails in fp32 where fp64 passes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def communicate_gradients(model: nn.Module, last: bool) -> None:
    """Gradients of a step's micro-steps accumulate unsharded; only the last one reduces them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over all (sharded) tensors together, the same plain scalar on every rank."""
    total = nn.utils.get_total_norm(tensors)
    return total.full_tensor() if hasattr(total, "full_tensor") else total
