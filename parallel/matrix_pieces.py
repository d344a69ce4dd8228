"""Matrices that are divided over tensor ranks, put side by side for what needs all of them.

A rank has some rows or some columns of a matrix, and FSDP has cut that piece once more, by rows. Each tensor rank's
piece has the same shape, so the ranks of a tensor group hold the same rows of their pieces: gathered, these are rows as
wide as all pieces together, and spread as the piece was (`parallel.matrix_owners` makes the matrices whole).

Cut by columns, pieces side by side are the matrix, up to the order of its columns where several lie in one tensor. Cut
by rows, a row of the gathered holds one row of each piece, and the matrix is what is left when they stand below each
other, in another order of rows. For a function that commutes with permutations of rows and of columns, as making
orthogonal does, neither order matters.

Every tensor rank then does the same work on the whole matrices. A matrix of which each rank has all, or of which it has
some of many (those of heads), is none of this file's.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.axes import Declared
from parallel.collectives import Comm
from parallel.matrix_owners import PURPOSE, MatrixCut, cuts
from parallel.tensor import TensorPiece

Function = Callable[[Tensor], Tensor]  # [S, M, N] -> [S, M, N]


class Beside(NamedTuple):
    """A parameter whose pieces are gathered: its piece, and whether they are cut by `rows`, else by columns."""

    piece: TensorPiece
    rows: bool

    @classmethod
    def of(cls, piece: TensorPiece | None) -> "Beside | None":
        """None for one that is whole here, or has whole matrices here."""
        if piece is None or piece.along is None or piece.along == len(piece.shape) - 3:
            return None
        return cls(piece, piece.along == len(piece.shape) - 2)

    def matrices(self, shape: Sequence[int], declared: Declared) -> list[MatrixCut]:
        """The matrices of its gathered pieces. shape: of a piece, as the ranks that share it have it together. Raises
        NotImplementedError for parts that lie across the cut, and for pieces of unequal shapes."""
        if len({self.piece.local_shape(rank) for rank in range(self.piece.ranks)}) > 1:
            raise NotImplementedError(f"matrices of a parameter {list(self.piece.shape)} in unequal pieces")
        *leads, rows, columns = shape
        if declared.parts and declared.along != self.piece.along:
            raise NotImplementedError(f"parts along dimension {declared.along} of a parameter cut along another")
        wide = self.wide((*leads, rows, columns))
        parts = tuple(end - begin for begin, end in self.piece.segments(0)) if self.piece.parts else declared.parts
        return cuts(wide, parts, declared.along)

    def wide(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of gathered pieces, from that of one."""
        return (*shape[:-1], shape[-1] * self.piece.pieces)

    def through(self, function: Function) -> Function:
        """The function of matrices in the order in which they are gathered."""
        if not self.rows:
            return function
        pieces = self.piece.pieces

        def below(x: Tensor) -> Tensor:
            S, M, N = x.shape
            return function(x.view(S, M * pieces, N // pieces)).view(S, M, N)

        return below


def gathered(directions: Sequence[Tensor], several: Sequence[Beside], comm: Comm, dtype: torch.dtype) -> list[Tensor]:
    """This rank's shards of pieces [..., N] -> the same rows of all pieces [..., pieces·N]. Collective."""
    flat = comm.all_gather(torch.cat([x.to(dtype).flatten() for x in directions]), purpose=PURPOSE)
    pieces = []
    for x, beside, parts in zip(directions, several, flat.split([x.numel() for x in directions], dim=1), strict=True):
        different = parts[:: beside.piece.copies].unflatten(1, x.shape) if x.numel() else None
        wide = beside.wide(x.shape)
        pieces.append(x.new_empty(wide, dtype=dtype) if different is None else different.movedim(0, -2).reshape(wide))
    return pieces


def own(results: Sequence[Tensor], several: Sequence[Beside], rank: int) -> list[Tensor]:
    """The way back: this rank's columns of what has become of all pieces."""
    parts = []
    for x, beside in zip(results, several, strict=True):
        which = rank * beside.piece.pieces // beside.piece.ranks
        parts.append(x.chunk(beside.piece.pieces, dim=-1)[which])
    return parts
