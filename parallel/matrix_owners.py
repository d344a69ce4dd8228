"""Matrices whose rows are spread over ranks, each made whole on one of them for what needs all of it.

Sharding gives a rank some rows of every parameter. A function of whole matrices (Muon's) would have to gather all of
them on every rank, which would then all compute the same. Here every matrix has one owner: the ranks send it their
rows, it computes, and sends each its rows of the result. Both ways are one all-to-all for many matrices together.

Two ranks, two parameters of four rows and two columns: FSDP gives rank 0 the rows 0 and 1 of each, rank 1 the rows 2
and 3. `assigned` gives the matrix X to rank 0 and Y to rank 1, the largest first, each to the rank with the least work
so far. In the first all-to-all rank 0 sends its two rows of Y (4 elements) and rank 1 its two rows of X; each now holds
one whole matrix, and makes it orthogonal. In the second they send the same rows back, changed. Each rank has sent and
received 8 elements; gathering both matrices on both ranks would cost 8 as well, but twice the Newton-Schulz steps.

Ranks need not hold equally much: three rows over two ranks lie as two and one, as `torch.chunk` cuts them, and a rank
may hold no row at all. The counts follow from the shapes alone (`shares`), so no rank asks another how much will come.

A parameter holds one matrix or several: those of experts along its first dimension, and parts side by side.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from parallel.collectives import LEDGER, all_gather_into
from parallel.liveness import HERE, Wait
from parallel.schedule.comm_volume import Traffic

TOGETHER = 1 << 25  # elements of whole matrices that a rank holds at a time, unless one matrix alone has more
PURPOSE = "matrices"
CUT = ("expert",)  # dimensions of a mesh along which ranks hold other experts

Name = TypeVar("Name")
Places = slice | list[int]
Function = Callable[[Tensor], Tensor]  # [S, M, N] -> [S, M, N], of S matrices of one shape


class PeriodicRange(NamedTuple):
    """Places of a dimension of `length`: `size` of them from `begin` on, and again after every `period`."""

    begin: int
    size: int
    period: int
    length: int

    def before(self, place: int) -> int:
        """Counts its places below this one."""
        rounds, rest = divmod(place, self.period)
        return rounds * self.size + min(max(rest - self.begin, 0), self.size)

    def between(self, begin: int, end: int) -> slice | list[int]:
        """Its places in [begin, end), counted from `begin`."""
        if self.period == self.length:
            first = max(self.begin - begin, 0)
            return slice(first, first + self.before(end) - self.before(begin))
        return [p - begin for p in range(begin, end) if 0 <= p % self.period - self.begin < self.size]


class MatrixCut(NamedTuple):
    """The place of a matrix in its parameter: parameter[lead, rows, columns], `lead` None in one of two dimensions."""

    lead: int | None
    rows: PeriodicRange
    columns: PeriodicRange

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.before(self.rows.length), self.columns.before(self.columns.length)


def cuts(shape: Sequence[int], parts: Sequence[int] = (), along: int = 0) -> list[MatrixCut]:
    """The matrices of a parameter of two or three dimensions; parts, along: as `models.axes.Declared` has them."""
    *leads, rows, columns = shape
    sides = [[PeriodicRange(0, length, length, length)] for length in (rows, columns)]
    if parts:
        begins, length = accumulate(parts, initial=0), shape[along]
        several = [PeriodicRange(b, size, sum(parts), length) for b, size in zip(begins, parts, strict=False)]
        sides[along - len(leads)] = several
    return [MatrixCut(i, r, c) for i in (range(leads[0]) if leads else [None]) for r in sides[0] for c in sides[1]]


class OwnedMatrix(NamedTuple):
    """A matrix of the parameter with this index, and its owner. rows: how many of its rows each rank holds."""

    parameter: int
    cut: MatrixCut
    owner: int
    rows: tuple[int, ...]


def assigned(
    begins: Sequence[Sequence[int]], matrices: Sequence[Sequence[MatrixCut]], world: int
) -> list[list[OwnedMatrix]]:
    """The matrices of each exchange. begins: of each parameter the first row of every rank, and how many it has."""
    pieces = [(i, cut) for i, several in enumerate(matrices) for cut in several]
    pieces.sort(key=lambda each: -_cost(each[1]))
    busy, buckets = [0.0] * world, list[list[OwnedMatrix]]()
    size = TOGETHER * world + 1
    for i, cut in pieces:
        owner = min(range(world), key=busy.__getitem__)
        busy[owner] += _cost(cut)
        elements = cut.shape[0] * cut.shape[1]
        if size + elements > TOGETHER * world:
            buckets.append([])
            size = 0
        size += elements
        buckets[-1].append(OwnedMatrix(i, cut, owner, tuple(_held(begins[i], cut, r) for r in range(world))))
    return buckets


def received(
    lengths: Sequence[int], matrices: Sequence[Sequence[MatrixCut]], world: int, itemsize: int
) -> list[Traffic]:
    """Traffic that each rank receives in `MatrixOwners.apply`, for parameters of so many rows that FSDP has sharded."""
    counts = [Traffic() for _ in range(world)]
    for bucket in assigned([shares(length, world) for length in lengths], matrices, world):
        for rank, traffic in enumerate(counts):
            there = sum((sum(m.rows) - m.rows[rank]) * m.cut.shape[1] for m in bucket if m.owner == rank)
            back = sum(m.rows[rank] * m.cut.shape[1] for m in bucket if m.owner != rank)
            traffic.add(PURPOSE, (there + back) * itemsize, 2 * (world > 1))
    return counts


def shares(length: int, world: int) -> list[int]:
    """The first row of each rank, and their number: FSDP cuts as torch.chunk does, and later ranks may get none."""
    step = -(-length // world)
    return [min(rank * step, length) for rank in range(world + 1)]


def whole(x: Tensor) -> Tensor:
    """The tensor of which ranks hold parts, dimension after dimension of its mesh: torch warns of two at a time.
    Collective."""
    if not isinstance(x, DTensor):
        return x
    placements = list(x.placements)
    for dim in range(len(placements) - 1):
        placements[dim] = Replicate()
        x = x.redistribute(placements=placements)
    return x.full_tensor()


def wholes(tensors: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
    """Each tensor as `whole` gives it. Tensors of one dtype whose rows one group of ranks shares travel in one message,
    where `whole` sends one for each. Collective."""
    results, together = dict(tensors), defaultdict[Any, dict[Name, DTensor]](dict)
    for name, x in tensors.items():
        if isinstance(x, DTensor) and (dim := _dim_of_rows(x)) is not None:
            together[x.device_mesh.get_group(dim), x.dtype][name] = x
        else:
            results[name] = whole(x)
    for (group, _), several in together.items():
        world, own = dist.get_world_size(group), torch.cat([x.to_local().reshape(-1) for x in several.values()])
        rows = [(shares(len(x), world), x.numel() // max(len(x), 1)) for x in several.values()]
        sizes = [[(begins[rank + 1] - begins[rank]) * each for begins, each in rows] for rank in range(world)]
        longest = max(map(sum, sizes))
        received = own.new_empty(world * longest)
        all_gather_into(received, nn.functional.pad(own, (0, longest - len(own))), group=group)
        parts = [row[: sum(held)].split(held) for row, held in zip(received.view(world, -1), sizes, strict=True)]
        for (name, x), pieces in zip(several.items(), zip(*parts, strict=True), strict=True):
            results[name] = torch.cat(pieces).view(x.shape)
    return results


def _dim_of_rows(x: DTensor) -> int | None:
    """The dimension of its mesh along which ranks hold other rows; None where anything else divides it too."""
    cut = [dim for dim, placement in enumerate(x.placements) if placement != Replicate()]
    return cut[0] if len(cut) == 1 and type(at := x.placements[cut[0]]) is Shard and at.dim == 0 else None


class MatrixOwners:
    """Who owns which matrix of some parameters: the largest first, each by whoever has the least to compute so far.

    parameters: whole, or sharded by rows over one mesh. matrices: of what the ranks that share a parameter hold of it
    together (`shape_here`). Raises NotImplementedError for another layout.
    """

    def __init__(self, parameters: Sequence[Tensor], matrices: Sequence[Sequence[MatrixCut]]):
        self.group, self.rank, self.world = _group(parameters)
        self.begins = [_begins(p, self.world) for p in parameters]
        self.buckets = assigned(self.begins, matrices, self.world)

    @classmethod
    def of_rank(
        cls, lengths: Sequence[int], matrices: Sequence[Sequence[MatrixCut]], rank: int, world: int
    ) -> "MatrixOwners":
        """Those of a rank among so many, for tensors on the meta device, which are not sent. lengths: rows of each
        parameter."""
        owners = cls.__new__(cls)
        owners.group, owners.rank, owners.world = None, rank, world
        owners.begins = [shares(length, world) for length in lengths]
        owners.buckets = assigned(owners.begins, matrices, world)
        return owners

    def apply(self, pieces: Sequence[Tensor], function: Function, dtype: torch.dtype) -> list[Tensor]:
        """`function` of every matrix in `dtype`, from this rank's rows of the parameters to its rows of the results.

        Collective. What of a parameter is in no matrix is 0 in its result.
        """
        results = [torch.zeros_like(piece) for piece in pieces]
        for bucket in self.buckets:
            order = sorted(bucket, key=lambda each: each.owner)
            sent = [_read(*self._place(pieces, each)).to(dtype).reshape(-1) for each in order]
            mine = [each for each in bucket if each.owner == self.rank]
            there = [sum(p.numel() for p, m in zip(sent, order, strict=True) if m.owner == r) for r in self._ranks()]
            here = [sum(each.rows[r] * each.cut.shape[1] for each in mine) for r in self._ranks()]
            received = self._exchange(torch.cat(sent), there, here)
            made = _computed(self._whole(received, mine), function)
            back = [_rows(*pair, r).reshape(-1) for r in self._ranks() for pair in zip(mine, made, strict=True)]
            returned = self._exchange(torch.cat(back) if back else received, here, there)
            for each, flat in zip(order, returned.split([p.numel() for p in sent]), strict=True):
                _write(*self._place(results, each), flat.view(-1, each.cut.shape[1]))
        return results

    def _ranks(self) -> range:
        return range(self.world)

    def _place(self, pieces: Sequence[Tensor], each: OwnedMatrix) -> tuple[Tensor, Places, Places]:
        """Finds this rank's rows of a matrix: the tensor, and the rows and columns in it."""
        piece, cut = pieces[each.parameter], each.cut
        begin, end = self.begins[each.parameter][self.rank : self.rank + 2]
        columns = cut.columns.between(0, cut.columns.length)
        if cut.lead is None:
            return piece, cut.rows.between(begin, end), columns
        if not begin <= cut.lead < end:
            return piece.new_empty(0, cut.columns.length), slice(0), columns
        return piece[cut.lead - begin], cut.rows.between(0, cut.rows.length), columns

    def _whole(self, received: Tensor, mine: list[OwnedMatrix]) -> list[Tensor]:
        """The matrices that this rank owns, from what every rank has sent of them."""
        sizes = [each.rows[r] * each.cut.shape[1] for r in self._ranks() for each in mine]
        flat = received.split(sizes) if mine else ()
        return [torch.cat(flat[i :: len(mine)]).view(each.cut.shape) for i, each in enumerate(mine)]

    def _exchange(self, parts: Tensor, there: list[int], here: list[int]) -> Tensor:
        """There go so many elements to each rank, and here come so many from each."""
        if self.world > 1 and parts.is_meta:
            return parts.new_empty(sum(here))
        if self.group is None:
            return parts
        received = parts.new_empty(sum(here))
        LEDGER.add(self.group.group_name, PURPOSE, (sum(here) - here[self.rank]) * parts.element_size())
        with HERE.waiting(Wait("", PURPOSE, "all-to-all")):
            dist.all_to_all_single(received, parts, here, there, group=self.group)
        return received


def _held(begins: Sequence[int], cut: MatrixCut, rank: int) -> int:
    """Counts a matrix's rows on a rank."""
    begin, end = begins[rank : rank + 2]
    if cut.lead is not None:
        return cut.shape[0] if begin <= cut.lead < end else 0
    return cut.rows.before(end) - cut.rows.before(begin)


def _read(piece: Tensor, rows: Places, columns: Places) -> Tensor:
    return piece[rows][:, columns]


def _write(piece: Tensor, rows: Places, columns: Places, values: Tensor) -> None:
    if isinstance(rows, list) and isinstance(columns, slice):
        piece[rows, columns] = values.to(piece.dtype)
    else:
        piece[rows][:, columns] = values.to(piece.dtype)


def _rows(each: OwnedMatrix, whole: Tensor, rank: int) -> Tensor:
    """The rows of a whole matrix that a rank holds: ranks hold them in order."""
    first = sum(each.rows[:rank])
    return whole[first : first + each.rows[rank]]


def _computed(matrices: list[Tensor], function: Function) -> list[Tensor]:
    """`function` of each, those of one shape together."""
    made: dict[int, Tensor] = {}
    for shape in dict.fromkeys(m.shape for m in matrices):
        alike = [i for i, m in enumerate(matrices) if m.shape == shape]
        made |= dict(zip(alike, function(torch.stack([matrices[i] for i in alike])).unbind(), strict=True))
    return [made[i] for i in range(len(matrices))]


def _cost(cut: MatrixCut) -> float:
    """The FLOPs, up to a factor, of a matrix's products with itself."""
    rows, columns = cut.shape
    return float(rows * columns * min(rows, columns))


def _group(parameters: Sequence[Tensor]) -> tuple[dist.ProcessGroup | None, int, int]:
    """The ranks over which they are sharded: the group, this rank in it, its size; (None, 0, 1) on one."""
    groups = {_shared(p) for p in parameters if isinstance(p, DTensor)}
    if not groups:
        return None, 0, 1
    if len(groups) > 1:
        raise NotImplementedError("whole matrices of parameters that are sharded over several meshes")
    mesh, dim = groups.pop()
    return (None if mesh.size(dim) == 1 else mesh.get_group(dim)), mesh.get_local_rank(dim), mesh.size(dim)


def _shared(parameter: DTensor) -> tuple[DeviceMesh, int]:
    """Its mesh, and the dimension along which ranks share its rows, or those of the experts that they all hold."""
    names = parameter.device_mesh.mesh_dim_names or ()
    dims = [i for i, name in enumerate(names) if name not in CUT and not parameter.placements[i].is_replicate()]
    cut = [parameter.placements[i] == Shard(0) for i, name in enumerate(names) if name in CUT]
    if len(dims) > 1 or not all(cut):
        raise NotImplementedError(f"whole matrices of a parameter that lies as {parameter.placements}")
    return parameter.device_mesh, dims[0] if dims else 0


def shape_here(parameter: Tensor) -> tuple[int, ...]:
    """The shape of what the ranks that share a parameter hold of it together: less than all where experts are cut."""
    if not isinstance(parameter, DTensor):
        return tuple(parameter.shape)
    names = parameter.device_mesh.mesh_dim_names or ()
    cut = math.prod(parameter.device_mesh.size(i) for i, name in enumerate(names) if name in CUT)
    return parameter.shape[0] // cut, *parameter.shape[1:]


def _begins(parameter: Tensor, world: int) -> list[int]:
    """The first rows of `shares`, checked against a parameter that FSDP has sharded."""
    length = shape_here(parameter)[0]
    if not isinstance(parameter, DTensor):
        return [0, length]
    mesh, dim = _shared(parameter)
    begins = shares(length, world)
    rank = mesh.get_local_rank(dim)
    assert begins[rank + 1] - begins[rank] == parameter.to_local().shape[0]
    return begins
