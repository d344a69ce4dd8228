"""Tensor parallelism: a layer's heads and widths divided among neighbouring ranks, by the names of parameters' axes.

`PLACED` maps an axis to what becomes of it. Every rank has parameters of its own, smaller shape, each a piece of the
logical one, and FSDP shards those over the ranks that hold the same piece. A mixer sees fewer heads; what it makes of
them is a part of a sum (`models.width`), which `DividedWidth.leave` adds up.

Between blocks a rank has its share of the tokens, of whole width: norms and residuals cost each rank a part of the
work and memory, and `enter` and `leave`, an all-gather and a reduce-scatter, send what an all-reduce alone would
(Korthikanti et al. 2022, 2205.05198). A rank's gradient of a parameter that is not divided comes from its own tokens,
heads or channels, so it is a part of a sum too, wherever the parameter stands: `sum_undivided_gradients` adds all of
them up once a step, after the last backward pass.

Two ranks, a mixer of two heads of width 2, D = 3: q's weight [4, 3] is cut by rows, rank 0 has [2, 3], out's weight
[3, 4] by columns. Each rank gathers all tokens, computes its head, multiplies by its [3, 2] of `out`, and the two
results are added while their tokens are dealt out again.

Fewer key heads than ranks: each rank has the key head that its query heads read, a copy of a neighbour's, and the
copies' gradients are summed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.axes import Declared
from models.kernels.cross_entropy import Scored
from parallel.activation_memory import parameter_name
from parallel.collectives import Comm, sum_over
from parallel.mesh import Meshes
from parallel.shards import local
from parallel.tensor_loss import cross_entropy, embed, score

PLACED = {
    "heads": "cut",  # by units, which must divide
    "ffn": "cut",
    "kv_heads": "shared",  # cut, or copied to several ranks where there are fewer than ranks
    "groups": "shared",
    "vocab": "rows",  # cut, whatever the number
}  # other axes stay whole, their gradients are summed
WHOLE_UNITS = ("heads", "kv_heads", "groups")  # axes of which only a module knows how far they can be cut
HIDDEN = "hidden"  # purpose of what enters and leaves a layer


@dataclass(frozen=True)
class TensorPiece:
    """The division of one parameter: along dimension `along`, `pieces` of them on as many neighbouring ranks each as
    `ranks` has of one, and in each of the `parts` that lie side by side. along: None for a parameter that stays whole.
    """

    shape: tuple[int, ...]
    ranks: int
    along: int | None = None
    pieces: int = 1
    parts: tuple[int, ...] = ()

    @property
    def copies(self) -> int:
        """The number of ranks that have the same piece."""
        return self.ranks // self.pieces

    def segments(self, rank: int) -> list[tuple[int, int]]:
        """[begin, end) along the dimension, of what `rank` has, in its own order."""
        assert self.along is not None
        piece, at, parts = rank * self.pieces // self.ranks, 0, []
        for width in self.parts or (self.shape[self.along],):
            parts.append((at + width * piece // self.pieces, at + width * (piece + 1) // self.pieces))
            at += width
        return parts

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of a rank's piece."""
        if self.along is None:
            return self.shape
        size = sum(end - begin for begin, end in self.segments(rank))
        return (*self.shape[: self.along], size, *self.shape[self.along + 1 :])

    def of(self, value: Tensor, rank: int) -> Tensor:
        """The piece of a rank, from the logical tensor."""
        if self.along is None:
            return value
        return torch.cat([value.narrow(self.along, b, e - b) for b, e in self.segments(rank)], dim=self.along)


class DividedWidth:
    """The answers of a tensor group: see `models.width`."""

    def __init__(self, comm: Comm):
        self.comm = comm

    def span(self, total: int) -> tuple[int, int]:
        rank, ranks = self.comm.rank, self.comm.size
        return total * rank // ranks, total * (rank + 1) // ranks

    def enter(self, x: Tensor, rows: tuple[int, int]) -> Tensor:
        y: Tensor = _Enter.apply(self.comm, rows, x)
        return y

    def leave(self, y: Tensor) -> Tensor:
        x: Tensor = _Leave.apply(self.comm, y)
        return x

    def sum(self, x: Tensor) -> Tensor:
        return sum_over(self.comm, x, purpose="channels")

    def place(self, x: Tensor, total: int) -> Tensor:
        begin, end = self.span(total)
        return nn.functional.pad(x, (begin, total - end))

    def join(self, x: Tensor, total: int) -> Tensor:
        return sum_over(self.comm, self.place(x, total), purpose="logits")

    def alike(self, x: Tensor) -> Tensor:
        y: Tensor = _Alike.apply(self.comm.size, x)
        return y

    def embed(self, tokens: Tensor, table: Tensor, vocabulary: int) -> Tensor:
        return embed(tokens, table, self.span(vocabulary)[0])

    def cross_entropy(
        self, x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, *, chunk: int | None, softcap: float | None
    ) -> Tensor:
        return cross_entropy(self.comm, x, weight, targets, self.span(vocabulary)[0], chunk=chunk, softcap=softcap)

    def score(
        self, x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, *, chunk: int | None, softcap: float | None
    ) -> Scored:
        return score(self.comm, x, weight, targets, self.span(vocabulary)[0], chunk=chunk, softcap=softcap)


def _dealt(y: Tensor, ranks: int) -> Tensor:
    """[B, T, D] -> [P, 1, C, D]: the tokens in as many equal shares, zeros behind the last."""
    flat = y.flatten(0, 1)
    share = -(-len(flat) // ranks)
    return nn.functional.pad(flat, (0, 0, 0, share * ranks - len(flat))).view(ranks, 1, share, -1)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, comm: Comm, rows: tuple[int, int], x: Tensor) -> Tensor:
        ctx.comm = comm
        whole = comm.all_gather(x, purpose=HIDDEN).flatten(0, 2)
        return whole[: rows[0] * rows[1]].view(*rows, -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, ctx.comm.reduce_scatter(_dealt(grad, ctx.comm.size), purpose=f"{HIDDEN} gradient")


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, comm: Comm, y: Tensor) -> Tensor:
        ctx.comm, ctx.rows = comm, y.shape[:2]
        return comm.reduce_scatter(_dealt(y, comm.size), purpose=HIDDEN)

    @staticmethod
    def backward(ctx, grad: Tensor):
        whole = ctx.comm.all_gather(grad, purpose=f"{HIDDEN} gradient").flatten(0, 2)
        return None, whole[: ctx.rows[0] * ctx.rows[1]].view(*ctx.rows, -1)


class _Alike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks: int, x: Tensor) -> Tensor:
        ctx.ranks = ranks
        return x.clone()  # sharding must not be handed a view

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, grad / ctx.ranks


def division(model: nn.Module, declared: Mapping[str, Declared], ranks: int) -> dict[str, TensorPiece]:
    """The pieces of all parameters, by name. Raises ValueError that says which layer cannot be divided, and why."""
    return {name: _piece(model, name, each, ranks) for name, each in declared.items()}


def _piece(model: nn.Module, name: str, declared: Declared, ranks: int) -> TensorPiece:
    shape = tuple(model.get_parameter(name).shape)
    cut = [(dim, axis) for dim, axis in enumerate(declared.axes) if axis in PLACED]
    if not cut or ranks == 1:
        return TensorPiece(shape, ranks)
    ((along, axis),) = cut  # a parameter with two such axes would be part of no sum that anybody takes
    beside = declared.along == along and sum(declared.parts) == shape[along]  # and not in turns
    parts = declared.parts if beside else ()
    pieces, units = ranks, _units(model, name, axis)
    if PLACED[axis] == "shared" and units < ranks and ranks % units == 0:
        pieces = units
    if PLACED[axis] != "rows" and any(n % pieces for n in (units, *(parts or (shape[along],)))):
        raise ValueError(f"parallel.tensor={ranks}: must divide the {units} {axis} of {_place(name)}")
    if pieces == 1:
        return TensorPiece(shape, ranks)
    return TensorPiece(shape, ranks, along, pieces, parts)


def _units(model: nn.Module, name: str, axis: str) -> int:
    """The number of parts of the axis that stay whole, by the innermost module around the parameter that says so."""
    size = model.get_parameter(name).shape
    path = name.split(".")[:-1]
    for depth in range(len(path), -1, -1):
        units = getattr(model.get_submodule(".".join(path[:depth])), "units", {})
        if axis in units:
            return units[axis] or size[_along(model, name, axis)]
    if axis in WHOLE_UNITS:
        raise ValueError(f"parallel.tensor: must be 1 with {_place(name)}, which does not say how its {axis} divide")
    return size[_along(model, name, axis)]


def _along(model: nn.Module, name: str, axis: str) -> int:
    return model.get_parameter(name).declared.axes.index(axis)  # type: ignore[attr-defined, no-any-return]


def _place(name: str) -> str:
    return name.removesuffix(".weight")


def divide(model: nn.Module, pieces: Mapping[str, TensorPiece], meshes: Meshes) -> "Division":
    """Gives a model on the meta device this rank's shapes, and its modules the answers of the group. Collective."""
    comm = meshes.comm("tensor")
    same = {count: meshes.copies(count) for count in sorted({piece.copies for piece in pieces.values()} - {1})}
    replace_parameters(model, pieces, DividedWidth(comm))
    return Division(pieces, comm, same)


def replace_parameters(model: nn.Module, pieces: Mapping[str, TensorPiece], width: DividedWidth) -> None:
    """Gives a model on the meta device the shapes of this rank of a group, and its modules the group's answers."""
    comm = width.comm
    for module_name, module in model.named_modules():
        if hasattr(module, "width"):
            module.width = width
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            piece = pieces[f"{module_name}.{leaf}".removeprefix(".")]
            if piece.along is not None:
                own = piece.of(parameter.detach(), comm.rank)
                smaller = nn.Parameter(own, requires_grad=parameter.requires_grad)
                smaller.declared = parameter.declared  # type: ignore[attr-defined]
                setattr(module, leaf, smaller)
        if hasattr(module, "bias_share") and module.bias is not None:
            if pieces[f"{module_name}.weight"].along == 1:  # each rank adds its share of the bias to its part
                module.bias_share = 1 / comm.size


@dataclass(frozen=True)
class Division:
    """A model's pieces by parameter name, the tensor group, and by how many ranks hold the same piece, the group of
    those."""

    pieces: Mapping[str, TensorPiece]
    comm: Comm
    same: Mapping[int, Comm]

    @property
    def rank(self) -> int:
        """This rank's place in its tensor group."""
        return self.comm.rank


def division_of(model: nn.Module) -> Division | None:
    """The division of a model that `divide` was given; None of any other."""
    division: Division | None = getattr(model, "division", None)
    return division


def sum_undivided_gradients(model: nn.Module) -> None:
    """Adds up, over the ranks of tensor groups, the gradients that are parts of a sum: those of parameters of which
    several ranks hold the same piece. Once a step, after the last backward pass, on the shards. Collective."""
    divided = division_of(model)
    if divided is None:
        return
    named = [
        (divided.pieces[parameter_name(n)].copies, local(p.grad))
        for n, p in model.named_parameters()
        if p.grad is not None
    ]
    for copies, comm in divided.same.items():
        parts = [grad for several, grad in named if several == copies]
        if not parts:
            continue
        total = comm.all_reduce(torch.cat([grad.flatten() for grad in parts]), purpose="partial gradients")
        for grad, whole in zip(parts, total.split([grad.numel() for grad in parts]), strict=True):
            grad.copy_(whole.view_as(grad))
