"""The order of transformations, from a model on the meta device to one that can train on every rank."""

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from models.axes import Declared, declarations, initial, start_buffers
from models.lm import LM
from parallel import activation_memory
from parallel.expert import spread_experts
from parallel.fsdp import shard, shard_experts
from parallel.mesh import Meshes
from parallel.pipeline.division import Division


def parameter_name(name: str) -> str:
    """A parameter's own name, without what the wrappers of layers insert."""
    return name.replace("_checkpoint_wrapped_module.", "")


def parallelise(
    model: LM,
    meshes: Meshes,
    *,
    seed: int,
    dtype: torch.dtype,
    remat: str,
    reshard_after_forward: bool,
    tile: int | None = None,
    offload_activations: bool = False,
    offload_optimizer: bool = False,
    division: Division | None = None,
) -> LM:
    """Applies, in order: the cut into pipeline stages, experts over ranks, recomputation of activations, sharding,
    memory, each parameter from (seed, name).

    division: of the layers among the ranks of a pipeline; None without one. dtype: of the master weights. remat, tile,
    offload_activations: see `parallel.activation_memory`. offload_optimizer: master weights, gradients and optimizer
    state live on the host. Returns the same model.
    """
    declared, device = declarations(model), meshes.device.type
    if division is not None:
        division.apply(model, meshes.place["pipeline"])
    model.to(dtype)
    experts = spread_experts(model, meshes) if meshes.mesh.expert > 1 else []
    if tile is not None:
        activation_memory.tile(model, tile)
    activation_memory.recompute(model.layers, remat, device=device)
    if offload_activations:
        activation_memory.offload(model.layers)
    layers, on_host = list(model.layers.values()), offload_optimizer and device != "cpu"
    if experts:
        shard_experts(experts, meshes.alike, reshard_after_forward=reshard_after_forward, on_host=on_host)
    shard(model, layers, meshes.dense, reshard_after_forward=reshard_after_forward, on_host=on_host)
    if division is not None:
        register_fsdp_forward_method(model, "part")
    model.to_empty(device="cpu" if on_host else device)
    start_buffers(model, device)
    initialise_sharded(model, declared, seed)
    return model


def initialise_sharded(model: nn.Module, declared: dict[str, Declared], seed: int) -> None:
    """Each rank draws the logical parameter and keeps its part, so that sharding changes no number."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = parameter_name(name)
            value = initial(seed, name, declared[name], tuple(parameter.shape)).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                value = value.to(parameter.device)
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)
