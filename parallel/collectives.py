"""Collectives inside a graph: each is an autograd function with its exact transpose, and every rank is in both.

The classic traps are closed here once. A plain `dist.all_gather` has no gradient. An autograd all-gather whose result
one rank does not use never runs its backward there, and the others wait for ever; so what a rank makes of the gathered
values is part of the function (`use`), and its backward always communicates, with zeros if it must.

What is sent goes through operators of the namespace `farspan`, which name their group by a string. So a checkpointing
policy sees a collective as it sees a matmul: it can keep the result, and computing a layer again then sends nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from models.precision import wide

# torch 2.13 renamed both; 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

NAMESPACE = "farspan"  # of the operators that communicate

Clock = Callable[[], AbstractContextManager[None]]


@torch.library.custom_op(f"{NAMESPACE}::all_gather", mutates_args=())
def all_gather(local: Tensor, ranks: int, group: str) -> Tensor:
    """[...] -> [P, ...], rank after rank of the process group of that name."""
    gathered = local.new_empty((ranks, *local.shape))
    _all_gather(gathered.view(-1), local.reshape(-1), group=_resolve_process_group(group))
    return gathered


@torch.library.custom_op(f"{NAMESPACE}::reduce_scatter", mutates_args=())
def reduce_scatter(whole: Tensor, group: str) -> Tensor:
    """[P, ...] -> [...], this rank's part of the sum over ranks."""
    part = whole.new_empty(whole.shape[1:])
    _reduce_scatter(part.view(-1), whole.reshape(-1), group=_resolve_process_group(group))
    return part


@torch.library.custom_op(f"{NAMESPACE}::all_reduce", mutates_args=())
def all_reduce(local: Tensor, group: str) -> Tensor:
    """The sum over ranks, in a new tensor."""
    total = local.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_resolve_process_group(group))
    return total


all_gather.register_fake(lambda local, ranks, group: local.new_empty((ranks, *local.shape)))
reduce_scatter.register_fake(lambda whole, group: whole.new_empty(whole.shape[1:]))
all_reduce.register_fake(lambda local, group: local.new_empty(local.shape))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.ranks, ctx.group = inputs[0].shape[0] if inputs[0].dim() else 0, inputs[-1]


all_gather.register_autograd(
    lambda ctx, grad: (reduce_scatter(grad.contiguous(), ctx.group), None, None), setup_context=_remember
)
reduce_scatter.register_autograd(
    lambda ctx, grad: (all_gather(grad, ctx.ranks, ctx.group), None), setup_context=_remember
)
all_reduce.register_autograd(lambda ctx, grad: (all_reduce(grad, ctx.group), None), setup_context=_remember)


@dataclass(frozen=True)
class Comm:
    """Some ranks that communicate. `waiting` is entered while this rank is blocked on the others."""

    ranks: tuple[int, ...]
    rank: int  # index of this process in `ranks`
    group: dist.ProcessGroup | None = None  # None when there is only one rank
    waiting: Clock = nullcontext

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def name(self) -> str:
        """The name by which operators know the group."""
        assert self.group is not None
        return self.group.group_name

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] -> [P, ...], rank after rank."""
        if self.size == 1:
            return x.unsqueeze(0)
        with self.waiting():
            return all_gather(x, self.size, self.name)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[P, ...] -> [...], this rank's part of the sum over ranks, accumulated in at least fp32."""
        if self.size == 1:
            return x.squeeze(0)
        with self.waiting():
            return reduce_scatter(wide(x), self.name).to(x.dtype)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in a new tensor."""
        if self.size == 1:
            return x.clone()
        with self.waiting():
            return all_reduce(x, self.name)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, comm: Comm, use: Callable[[Tensor], Tensor], linear: bool, local: Tensor) -> Tensor:
        gathered = comm.all_gather(local)
        ctx.comm, ctx.use, ctx.shape = comm, use, gathered.shape
        ctx.save_for_backward(*([] if linear else [gathered]))
        return use(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors
        gathered = saved[0].detach() if saved else grad.new_zeros(ctx.shape)
        with torch.enable_grad():
            used = ctx.use(gathered.requires_grad_())
        (gradient,) = torch.autograd.grad(used, gathered, grad) if used.requires_grad else (torch.zeros_like(gathered),)
        return None, None, None, ctx.comm.reduce_scatter(gradient)


def gather(comm: Comm, local: Tensor, use: Callable[[Tensor], Tensor], *, linear: bool = False) -> Tensor:
    """`use(local of all ranks, [P, ...])`. `linear` promises that `use` is linear: nothing is kept for its backward."""
    return _Gathered.apply(comm, use, linear, local)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, comm: Comm, local: Tensor) -> Tensor:
        ctx.comm = comm
        return comm.all_reduce(local)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, ctx.comm.all_reduce(grad)


def sum_over(comm: Comm, local: Tensor) -> Tensor:
    """Σ over ranks, on every rank. Each rank's use of it is a use of one sum, so the transpose sums the gradients."""
    return _Sum.apply(comm, local)
