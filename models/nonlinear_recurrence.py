"""Recurrences whose steps are no affine maps of the state: no span has an effect that is known before its state is.

What such a span does can only be run, when the spans before it have been. Over ranks the state goes from one to the
next, and its gradient the same way back (`parallel.sequence.nonlinear`): exact at any layout, and no faster than one
rank, save for all that is done outside of it, which every rank does for its tokens at the same time.

Legend: B spans, T tokens. A state is one tensor [B, ...] in at least fp32, zeros for a document that has not begun.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.kernels.pieces import pieces_of


@dataclass(frozen=True)
class Serial(ABC):
    """A rule of `models.mixers` that is run. `shared`: tensors that are the same for all tokens, weights among them."""

    shared: tuple[Tensor, ...] = ()

    rule: ClassVar[str]

    @abstractmethod
    def nothing(self, *xs: Tensor) -> Tensor:
        """The state [B, ...] before any token."""

    @abstractmethod
    def run(self, xs: tuple[Tensor, ...], shared: tuple[Tensor, ...], positions: Tensor, state: Tensor) -> "Ran":
        """The outputs [B, T, ...] of a span and the state that leaves it. xs are [B, T, ...], positions [B, T] those in
        the document: 0 starts one, and what entered is forgotten."""

    def begin(self, *xs: Tensor, positions: Tensor, state: Tensor | None) -> "Ran":
        """The same with its own `shared`, from nothing where there is no state."""
        return self.run(xs, self.shared, positions, self.nothing(*xs) if state is None else state)


Ran = tuple[Tensor, Tensor]


def starts_of(positions: Tensor) -> dict[int, Tensor]:
    """Maps each token at which a document starts to a mask [B] of the rows concerned. None on the meta device."""
    if positions.is_meta:
        return {}
    starts = positions == 0
    at = {piece.begin for row in pieces_of(positions) for piece in row if not piece.past}
    return {t: starts[:, t] for t in sorted(at)}


def masked(start: Tensor, x: Tensor, value: float = 0.0) -> Tensor:
    """x [B, ...] with `value` in the rows that start [B]."""
    return torch.where(start.view(-1, *(1,) * (x.dim() - 1)), value, x)
