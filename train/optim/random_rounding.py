"""Results of an optimizer's step, put into weights; into those of 16 bits rounded at random.

The random bits of an element belong to its place in the whole weight (`models.kernels.stochastic`), wherever it lies:
on a rank of some rows, or of some of the columns that tensor ranks have divided.
"""

import math
from typing import Any

import torch
from torch import Tensor

from models.kernels.stochastic import noise_at, to_bf16
from parallel.shards import local

TOGETHER = 1 << 20  # elements whose random bits are made at a time: they take 36 bytes each meanwhile


def is_rounded(p: Tensor) -> bool:
    """Says whether this rank's part of a weight is bf16."""
    return local(p).dtype == torch.bfloat16


@torch.no_grad()
def put(p: Tensor, value: Tensor, step: int) -> None:
    """Puts this rank's part of a weight's new value there, fp32 or better. step: the number of the weight's steps."""
    weight = local(p)
    if weight.dtype != torch.bfloat16:
        weight.copy_(value)
        return
    into, stream = weight.view(-1), getattr(p, "stream", 0)
    for begin, part in enumerate(value.reshape(-1).split(TOGETHER)):
        where = places(p, begin * TOGETHER, len(part), weight.shape, weight.device)
        into.narrow(0, begin * TOGETHER, len(part)).copy_(to_bf16(part.float(), noise_at(stream, step, where)))


def places(p: Tensor, begin: int, count: int, shape: torch.Size, device: torch.device) -> Tensor:
    """int64 [count], the places in the whole weight of this rank's elements from `begin` on. shape: of its part."""
    rest, piece = torch.arange(begin, begin + count, device=device), getattr(p, "piece", None)
    if piece is None or piece.along is None:
        return rest + first_row(p) * math.prod(shape[1:])
    stride, found = 1, torch.zeros_like(rest)
    for dim in range(len(shape) - 1, -1, -1):
        at = rest % shape[dim] + (first_row(p) if dim == 0 else 0)
        if dim == piece.along:
            rank = p.tensor_comm.rank  # type: ignore[attr-defined]
            at = torch.cat([torch.arange(*each, device=device) for each in piece.segments(rank)])[at]
        found += at * stride
        rest, stride = rest // shape[dim], stride * piece.shape[dim]
    return found


def first_row(p: Any) -> int:
    """The row of the weight, or of a tensor rank's piece of it, at which this rank's part begins."""
    if not hasattr(p, "to_local") or not p.ndim:
        return 0
    # Imported with DTensor, which takes a launcher, that checks an optimizer's settings alone, a second.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return int(offset[0])


def as_weight(p: Any, value: Tensor) -> Tensor:
    """A tensor that lies on the ranks as a weight does, of this rank's part."""
    if not hasattr(p, "to_local"):
        return value
    shaped: Tensor = type(p).from_local(
        value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return shaped


def zeros(p: Tensor) -> Tensor:
    """Zeros as a weight, in at least fp32, where the optimizer keeps a mean of its gradients."""
    part = local(p)
    dtype = torch.promote_types(p.dtype, torch.float32)
    return as_weight(p, torch.zeros(part.shape, dtype=dtype, device=part.device))


def adamw_step(
    p: Tensor, grad: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any], step: int, most: Tensor | None = None
) -> None:
    """One step of AdamW. p: the weight. grad, mean, square: this rank's parts, fp32 or better, of its gradient and of
    the running means, changed in place. most: the largest mean square so far (amsgrad), changed too."""
    beta1, beta2 = group["betas"]
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    divisor = square if most is None else torch.maximum(most, square, out=most)
    root = (divisor.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    value = local(p).to(grad.dtype) * (1 - group["lr"] * group["weight_decay"])
    put(p, value.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step)), step)
