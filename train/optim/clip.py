"""Gradients, made smaller before they are applied: element by element, weight by weight, and all together."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.collectives import Comm
from parallel.fsdp import norm
from parallel.parallelize import parameter_name
from parallel.pipeline.runner import Pipeline
from parallel.shards import local

PURPOSE = "gradient norms"


def clip(
    model: nn.Module,
    comm: Comm,
    *,
    largest: float,
    each: float | None,
    value: float | None,
    pipeline: Pipeline | None = None,
) -> Tensor:
    """Clips in place, in this order, and returns the 2-norm of all gradients together as it was. Collective.

    value: largest magnitude of an element, None for any. each: largest 2-norm of one weight's gradient, None for any;
    component-wise clipping (2210.10325). largest: of all of them together. comm: all ranks that
    hold some of the weights. pipeline: whose other ranks have weights of their own, None without one.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    before = after = _total(parameters, gradients, comm, pipeline)
    if value is not None:
        for gradient in gradients:
            local(gradient).clamp_(-value, value)
    if each is not None:
        for gradient, size in zip(gradients, norms(gradients, comm, parameters).unbind(), strict=True):
            local(gradient).mul_((each / (size + EPSILON)).clamp(max=1.0).to(gradient.dtype))
    if value is not None or each is not None:
        after = _total(parameters, gradients, comm, pipeline)
    # One that is not finite scales nothing: it would spread to all gradients, and hide where it is from.
    size = after.nan_to_num(0.0, 0.0, 0.0)
    for dtype in {g.dtype for g in gradients}:
        scale = (largest / (size.to(dtype) + EPSILON)).clamp(max=1.0)
        torch._foreach_mul_([local(g) for g in gradients if g.dtype == dtype], scale)
    return before


def _holders(parameter: Tensor) -> int:
    """The number of ranks that hold each element of a parameter: copies of it, and of the piece that it is."""
    return getattr(parameter, "holders", 1)


def _total(parameters: list[nn.Parameter], gradients: list[Tensor], comm: Comm, pipeline: Pipeline | None) -> Tensor:
    """The 2-norm of all gradients together, whatever meshes they lie on: what a rank holds counts by the share that is
    its alone, and what several ranks of a pipeline hold once. Collective."""
    if pipeline is not None:
        gradients = [g for p, g in zip(parameters, gradients, strict=True) if not getattr(p, "elsewhere", False)]
        parameters = [p for p in parameters if not getattr(p, "elsewhere", False)]
    if all(p.device_mesh.size() == comm.size for p in parameters if isinstance(p, DTensor)):
        total = norm(gradients)
    else:
        total = norms(gradients, comm, parameters).square().sum().sqrt()
    if pipeline is None:
        return total
    return pipeline.comm.all_reduce(total.double().square(), purpose=PURPOSE).sqrt()


EPSILON = 1e-6  # beside a norm, as torch.nn.utils has it


def norms(tensors: list[Tensor], comm: Comm, parameters: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each of some tensors, which lie as these parameters do, float64 [N], the same on every rank.
    Collective."""
    own = torch.stack([torch.linalg.vector_norm(local(x), dtype=torch.float64) for x in tensors]).square()
    if any(_holders(p) > 1 for p in parameters):
        own = own / own.new_tensor([_holders(p) for p in parameters])
    return comm.all_reduce(own, purpose=PURPOSE).sqrt()


def layer_norms(model: nn.Module, comm: Comm, pipeline: Pipeline | None = None) -> dict[str, dict[str, float]]:
    """The 2-norms of each layer's gradients and weights, and of what stands outside of layers, by name. Collective."""
    named = [(_layer(parameter_name(n)), p, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    by_layer: dict[str, dict[str, float]] = {}
    of: dict[str, list[Tensor]] = {"gradient_norms": [g for *_, g in named]}
    of["weight_norms"] = [local(p).detach() for _, p, _ in named]
    for what, tensors in of.items():
        squares: dict[str, float] = {}
        for (layer, *_), size in zip(named, norms(tensors, comm, [p for _, p, _ in named]).tolist(), strict=True):
            squares[layer] = squares.get(layer, 0.0) + size**2
        by_layer[what] = {layer: square**0.5 for layer, square in squares.items()}
    return by_layer if pipeline is None else _of_all(by_layer, pipeline.comm)


def _of_all(results: dict[str, dict[str, float]], comm: Comm) -> dict[str, dict[str, float]]:
    """The norms of all ranks of a pipeline; what several hold is the same on each."""
    ranks: list[dict[str, dict[str, float]]] = [{} for _ in comm.ranks]
    dist.all_gather_object(ranks, results, group=comm.group)
    return {what: {layer: norm for rank in reversed(ranks) for layer, norm in rank[what].items()} for what in results}


def _layer(name: str) -> str:
    """`layers.3` of a weight in a layer, else the first part of its name."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
