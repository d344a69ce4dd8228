"""Collectives inside a graph: each is an autograd function with its exact transpose, and every rank is in both.

The classic traps are closed here once. A plain `dist.all_gather` has no gradient. An autograd all-gather whose result
one rank does not use never runs its backward there, and the others wait for ever; so what a rank makes of the gathered
values is part of the function (`use`), and its backward always communicates, with zeros if it must.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from models.precision import wide

# torch 2.13 renamed both; 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Clock = Callable[[], AbstractContextManager[None]]


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

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] -> [P, ...], rank after rank."""
        if self.size == 1:
            return x.unsqueeze(0)
        gathered = x.new_empty((self.size, *x.shape))
        with self.waiting():
            _all_gather(gathered.view(-1), x.reshape(-1), group=self.group)
        return gathered

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[P, ...] -> [...], this rank's part of the sum over ranks, accumulated in at least fp32."""
        if self.size == 1:
            return x.squeeze(0)
        whole = wide(x).contiguous()
        part = torch.empty_like(whole[0])
        with self.waiting():
            _reduce_scatter(part.view(-1), whole.view(-1), group=self.group)
        return part.to(x.dtype)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in a new tensor."""
        total = x.clone()
        if self.size > 1:
            with self.waiting():
                dist.all_reduce(total, group=self.group)
        return total


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
