"""The order of transformations, from a model on the meta device to one that can train on every rank."""

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from models.axes import Declared, declarations, initial, number, start_buffers
from models.lm import LM
from parallel import activation_memory
from parallel.activation_memory import parameter_name as parameter_name
from parallel.coded_weights import gather_in_few_bits
from parallel.expert import spread_experts
from parallel.fsdp import shard, shard_experts
from parallel.mesh import Meshes
from parallel.pipeline.cut import PipelineCut
from parallel.schedule.comm_volume import GradientFormat
from parallel.shards import ByParts, local
from parallel.tensor import TensorPiece, divide, division


def parallelise(
    model: LM,
    meshes: Meshes,
    *,
    seed: int,
    dtype: torch.dtype,
    remat: str,
    reshard_after_forward: bool,
    gradients: GradientFormat = "high",
    tile: int | None = None,
    offload_activations: bool = False,
    offload_optimizer: bool = False,
    cut: PipelineCut | None = None,
    sharded: bool = True,
) -> LM:
    """Applies, in order: the cut into pipeline stages, the division of layers over tensor ranks, experts over ranks,
    recomputation of activations, sharding, memory, each parameter from (seed, name), weights in few bits.

    cut: of the layers among the ranks of a pipeline; None without one. dtype: of the master weights. remat, tile,
    offload_activations: see `parallel.activation_memory`. offload_optimizer: master weights, gradients and optimizer
    state live on the host. sharded: false leaves weights whole on every rank, for an engine that cuts them itself, and
    knows data and sequence ranks alone. gradients: their format between ranks (`parallel.fsdp.shard`). Returns the same
    model.
    """
    declared, device = declarations(model), meshes.device.type
    pieces = division(model, declared, meshes.mesh.tensor)  # of all stages: they open the same groups
    if cut is not None:
        cut.apply(model, meshes.place["pipeline"])
    model.division = divide(model, pieces, meshes) if meshes.mesh.tensor > 1 else None
    model.to(dtype)
    experts = spread_experts(model, meshes) if meshes.mesh.expert > 1 else []
    if tile is not None:
        activation_memory.tile(model, tile)
    for each in (model.layers, model.mtp):
        activation_memory.recompute(each, remat, device=device)
        if offload_activations:
            activation_memory.offload(each)
    layers, on_host = [*model.layers.values(), *model.mtp.values()], offload_optimizer and device != "cpu"
    with ByParts():
        if experts:
            shard_experts(experts, meshes.alike, reshard_after_forward=reshard_after_forward, on_host=on_host)
        if sharded:
            shard(
                model,
                layers,
                meshes.dense,
                reshard_after_forward=reshard_after_forward,
                on_host=on_host,
                gradients=gradients,
            )
    if cut is not None:
        register_fsdp_forward_method(model, "part")
    with ByParts():
        model.to_empty(device="cpu" if on_host else device)
    start_buffers(model, device)
    initialise_sharded(model, declared, seed, pieces, meshes.place["tensor"])
    if sharded:
        gather_in_few_bits(model, meshes.dense, meshes.alike if experts else None)
    for name, parameter in model.named_parameters():
        name = parameter_name(name)
        parameter.piece = pieces[name]  # type: ignore[attr-defined]
        parameter.stream = number(seed, f"{name}/rounding")  # type: ignore[attr-defined]
        if model.division is not None:
            parameter.tensor_comm = model.division.comm  # type: ignore[attr-defined]
        parameter.holders = meshes.mesh.replicate * pieces[name].copies  # type: ignore[attr-defined]
        parameter.elsewhere = cut is not None and cut.holders[name][0] != meshes.place["pipeline"]  # type: ignore[attr-defined]
    return model


def initialise_sharded(
    model: nn.Module, declared: dict[str, Declared], seed: int, pieces: dict[str, TensorPiece], rank: int
) -> None:
    """Each rank draws the logical parameter and keeps its part, so that sharding changes no number."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = parameter_name(name)
            value = initial(seed, name, declared[name], pieces[name].shape).to(parameter.dtype)
            value = pieces[name].of(value, rank)
            if isinstance(parameter, DTensor):
                value = value.to(parameter.device)
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            local(parameter).copy_(local(value))
