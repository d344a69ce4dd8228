"""Collectives inside a graph: each is an autograd function with its exact transpose, and every rank is in both.

The classic traps are closed here once. A plain `dist.all_gather` has no gradient. An autograd all-gather whose result
one rank does not use never runs its backward there, and the others wait for ever; so what a rank makes of the gathered
values is part of the function (`use`), and its backward always communicates, with zeros if it must.

Two ranks that gather x0 = 2 and x1 = 3, where only rank 1 uses the result: its loss is x0·x1 = 6, rank 0's is 0. The
gradient of the sum of both losses by x0 is x1 = 3, and it arises on rank 1. A plain gather would lose it; an autograd
gather would reduce-scatter in its backward, and rank 0, whose loss does not depend on the gathered tensor, would never
enter that backward: rank 1 waits until the watchdog ends the run. `gather` below takes the use
with it: rank 0 makes zeros of the gathered values, which enter its graph as x0 enters that of rank 1. So backward runs
on both; rank 0 contributes zeros, and receives 3.

The transposes come in pairs: an all-gather's is a reduce-scatter (a sum, never a mean: the loss is divided by the
global count of tokens once, at the end), an all-reduce's an all-reduce, an all-to-all's the all-to-all back, a send's a
receive. Order is the other trap: NCCL and gloo match calls by their order, so every rank issues the same collectives of
a group in the same order, forward and backward. Autograd runs nodes in the reverse of forward order, which keeps this
as long as no rank has a node that another lacks.

Messages go through operators of the namespace `farspan`, which name their group by a string. So a checkpointing
policy sees a collective as it sees a matmul: it can keep the result, and computing a layer again then sends nothing.

Each one says what it is for, and `LEDGER` counts the calls and the bytes that this process received, by mesh axis and
by purpose.
"""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from models.precision import wide
from models.recompute import kept
from parallel.liveness import HERE, Marked, Wait

# torch 2.13 renamed both; 2.11 has only the old names.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

NAMESPACE = "farspan"  # of the operators that communicate

Clock = Callable[[], AbstractContextManager[None]]


class LedgerEntry(NamedTuple):
    """A kind of communication: the axis of the mesh, and its purpose."""

    axis: str
    purpose: str


@dataclass
class Ledger:
    """Calls, and bytes that this process received from others. An all-reduce counts as 2(P-1)/P of its bytes, which is
    what a ring receives. FSDP's gathers and reductions of weights are in it (`parallel.fsdp`); what torch sends to take
    a norm or to write a checkpoint is not."""

    axes: dict[str, str] = field(default_factory=dict)  # by the name of the process group; others are of the world
    calls: Counter[LedgerEntry] = field(default_factory=Counter)
    bytes: Counter[LedgerEntry] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # effects cross beside the main thread

    def add(self, group: str, purpose: str, received: int) -> None:
        entry = LedgerEntry(self.axes.get(group, "world"), purpose)
        with self._lock:
            self.calls[entry] += 1
            self.bytes[entry] += received

    def take(self) -> tuple[Counter[LedgerEntry], Counter[LedgerEntry]]:
        """Bytes and calls since the last time."""
        with self._lock:
            bytes, calls = self.bytes, self.calls
            self.bytes, self.calls = Counter(), Counter()
        return bytes, calls


LEDGER = Ledger()


def _named(group: str) -> dist.ProcessGroup:
    return _resolve_process_group(GroupName(group))


@torch.library.custom_op(f"{NAMESPACE}::all_gather", mutates_args=())
def all_gather(local: Tensor, ranks: int, group: str, purpose: str) -> Tensor:
    """[...] -> [P, ...], rank after rank of the process group of that name."""
    LEDGER.add(group, purpose, (ranks - 1) * local.nbytes)
    gathered = local.new_empty((ranks, *local.shape))
    all_gather_into(gathered.view(-1), local.reshape(-1), group=_named(group))
    return gathered


@torch.library.custom_op(f"{NAMESPACE}::reduce_scatter", mutates_args=())
def reduce_scatter(whole: Tensor, group: str, purpose: str) -> Tensor:
    """[P, ...] -> [...], this rank's part of the sum over ranks."""
    LEDGER.add(group, purpose, whole.nbytes // whole.shape[0] * (whole.shape[0] - 1))
    part = whole.new_empty(whole.shape[1:])
    reduce_scatter_into(part.view(-1), whole.reshape(-1), group=_named(group))
    return part


@torch.library.custom_op(f"{NAMESPACE}::all_reduce", mutates_args=())
def all_reduce(local: Tensor, group: str, purpose: str) -> Tensor:
    """The sum over ranks, in a new tensor."""
    ranks = _named(group).size()
    LEDGER.add(group, purpose, 2 * (ranks - 1) * local.nbytes // ranks)
    total = local.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_named(group))
    return total


@torch.library.custom_op(f"{NAMESPACE}::all_to_all", mutates_args=())
def all_to_all(parts: Tensor, group: str, purpose: str) -> Tensor:
    """[P, ...] -> [P, ...]: part p goes to rank p, and what comes from rank p is part p of the result."""
    LEDGER.add(group, purpose, parts.nbytes // parts.shape[0] * (parts.shape[0] - 1))
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=_named(group))
    return received


all_gather.register_fake(lambda local, ranks, group, purpose: local.new_empty((ranks, *local.shape)))
reduce_scatter.register_fake(lambda whole, group, purpose: whole.new_empty(whole.shape[1:]))
all_reduce.register_fake(lambda local, group, purpose: local.new_empty(local.shape))
all_to_all.register_fake(lambda parts, group, purpose: parts.new_empty(parts.shape))


@dataclass(frozen=True)
class Comm:
    """Some ranks that communicate. `waiting` is entered while this rank is blocked on the others.

    layer: the slot for which they do, where it is known.
    """

    ranks: tuple[int, ...]
    rank: int  # index of this process in `ranks`
    group: dist.ProcessGroup | None = None  # None when there is only one rank
    waiting: Clock = nullcontext
    layer: str = ""

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def name(self) -> str:
        """The name by which operators know the group."""
        assert self.group is not None
        return self.group.group_name

    def all_gather(self, x: Tensor, *, purpose: str) -> Tensor:
        """[...] -> [P, ...], rank after rank."""
        if self.size == 1:
            return x.unsqueeze(0)
        with self._blocked(purpose, "all-gather"):
            return kept(lambda: all_gather(x, self.size, self.name, purpose))

    def reduce_scatter(self, x: Tensor, *, purpose: str) -> Tensor:
        """[P, ...] -> [...], this rank's part of the sum over ranks, accumulated in at least fp32."""
        if self.size == 1:
            return x.squeeze(0)
        with self._blocked(purpose, "reduce-scatter"):
            return kept(lambda: reduce_scatter(wide(x), self.name, purpose)).to(x.dtype)

    def all_reduce(self, x: Tensor, *, purpose: str) -> Tensor:
        """The sum over ranks, in a new tensor."""
        if self.size == 1:
            return x.clone()
        with self._blocked(purpose, "all-reduce"):
            return kept(lambda: all_reduce(x, self.name, purpose))

    def all_to_all(self, x: Tensor, *, purpose: str) -> Tensor:
        """[P, ...] -> [P, ...]: what rank p has as part r comes to rank r as part p. Its own transpose."""
        if self.size == 1:
            return x.clone()
        with self._blocked(purpose, "all-to-all"):
            return kept(lambda: all_to_all(x, self.name, purpose))

    def start_all_to_all(
        self, x: Tensor, there: list[int], here: list[int], *, purpose: str
    ) -> tuple[Marked | None, Tensor]:
        """[S, ...] -> [M, ...], of which `there` [P] go to each rank and `here` [P] come from each, without waiting:
        they are there when the work is done. The work is None where a layer that is computed again has kept them.

        Hold on to both, and to `x`, until then.
        """
        works: list[Marked] = []

        def start(x: Tensor) -> list[Tensor]:
            received = x.new_empty((sum(here), *x.shape[1:]))
            LEDGER.add(self.name, purpose, received.nbytes - received[: here[self.rank]].nbytes)
            work = dist.all_to_all_single(received, x, here, there, group=self.group, async_op=True)
            works.append(HERE.marked(work, Wait(self.layer, purpose, "all-to-all", self.ranks)))
            return [received]

        if self.size == 1:
            return None, x
        received = as_operator(start, x)[0]
        return (works[0] if works else None), received

    @contextmanager
    def _blocked(self, purpose: str, kind: str) -> Iterator[None]:
        with self.waiting(), HERE.waiting(Wait(self.layer, purpose, kind, self.ranks)):
            yield

    def _marked(self, work: dist.Work | None, purpose: str, kind: str, other: int) -> Marked:
        return HERE.marked(work, Wait(self.layer, purpose, kind, (self.ranks[other],)))

    def send(self, x: Tensor, to: int, *, purpose: str) -> Marked:
        """Starts to send `x` to the group's rank `to`. Hold on to both until the work is done."""
        return self._marked(dist.isend(x, group=self.group, group_dst=to), purpose, "send", to)

    def receive(self, like: Tensor, source: int, *, purpose: str) -> Tensor:
        """Waits for a tensor of the shape and dtype of `like` from the group's rank `source`."""
        work, x = self.start_receive(like, source, purpose=purpose)
        with self.waiting():
            work.wait()
        return x

    def start_receive(self, like: Tensor, source: int, *, purpose: str) -> tuple[Marked, Tensor]:
        """The same without waiting: the tensor is there when the work is done."""
        LEDGER.add(self.name, purpose, like.nbytes)
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        work = dist.irecv(x, group=self.group, group_src=source)
        return self._marked(work, purpose, "receive", source), x


_calls: dict[int, Callable[..., list[Tensor]]] = {}
_numbers = itertools.count()


@torch.library.custom_op(f"{NAMESPACE}::call", mutates_args=())
def call(tensors: list[Tensor], number: int) -> list[Tensor]:
    """A function that communicates, by its number."""
    return _calls[number](*tensors)


def as_operator(function: Callable[..., list[Tensor]], *tensors: Tensor) -> list[Tensor]:
    """`function(*tensors)`, new tensors, as one operator: a checkpointing policy keeps its results and sends nothing
    twice. No gradient passes through it."""
    number = next(_numbers)
    _calls[number] = function
    try:
        return kept(lambda: call(list(tensors), number))
    finally:
        del _calls[number]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, comm: Comm, use: Callable[[Tensor], Tensor], linear: bool, purpose: str, local: Tensor) -> Tensor:
        gathered = comm.all_gather(local, purpose=purpose)
        ctx.comm, ctx.use, ctx.shape, ctx.purpose = comm, use, gathered.shape, purpose
        ctx.save_for_backward(*([] if linear else [gathered]))
        return use(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors
        gathered = saved[0].detach() if saved else grad.new_zeros(ctx.shape)
        with torch.enable_grad():
            used = ctx.use(gathered.requires_grad_())
        (gradient,) = torch.autograd.grad(used, gathered, grad) if used.requires_grad else (torch.zeros_like(gathered),)
        return None, None, None, None, ctx.comm.reduce_scatter(gradient, purpose=f"{ctx.purpose} gradient")


def gather(comm: Comm, local: Tensor, use: Callable[[Tensor], Tensor], *, purpose: str, linear: bool = False) -> Tensor:
    """`use(local of all ranks, [P, ...])`. `linear` promises that `use` is linear: nothing is kept for its backward."""
    return _Gathered.apply(comm, use, linear, purpose, local)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, comm: Comm, purpose: str, local: Tensor) -> Tensor:
        ctx.comm, ctx.purpose = comm, purpose
        return comm.all_reduce(local, purpose=purpose)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, ctx.comm.all_reduce(grad, purpose=f"{ctx.purpose} gradient")


def sum_over(comm: Comm, local: Tensor, *, purpose: str) -> Tensor:
    """Σ over ranks, on every rank. Each rank's use of it is a use of one sum, so the transpose sums the gradients."""
    return _Sum.apply(comm, purpose, local)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, comm: Comm, purpose: str, parts: Tensor) -> Tensor:
        ctx.comm, ctx.purpose = comm, purpose
        return comm.all_to_all(parts, purpose=purpose)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, ctx.comm.all_to_all(grad, purpose=f"{ctx.purpose} gradient")


def exchange(comm: Comm, parts: Tensor, *, purpose: str) -> Tensor:
    """parts [P, ...], the p-th for rank p -> [P, ...], the p-th from rank p."""
    return _Exchanged.apply(comm, purpose, parts)
