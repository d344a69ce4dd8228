"""A linear mixer in the place of softmax attention, beginning from its projections.

Both read a token with queries, keys and values of some heads, and both close with one matrix: what attention has
learnt to look for, to be found by, to say and to write stays, and only the sum over earlier tokens is another
(Kasai et al. 2021, 2103.13076; LoLCATs, 2410.10254). A query of attention has several to a key where keys are grouped;
a linear mixer gives each query head a key and a value of its own, so the group's are repeated.

A mixer that can begin so defines `like`, its own options, and `inherited`, its parameters' values by name; those that
are not named start as they always do.

Legend: H heads, K channels of a head, D model width.
"""

import math
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class HeadShape(NamedTuple):
    """The sizes of softmax attention: its model's width, its query heads, and the channels of each."""

    dim: int
    heads: int
    head_dim: int


class SoftmaxWeights(NamedTuple):
    """The projections of softmax attention: `q`, `k` and `v` [H·K, D], keys and values repeated for each query head;
    `out` [D, H·K]; `gate` [H·K, D], that of its output, or None."""

    shape: HeadShape
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    gate: Tensor | None


class Inheriting(Protocol):
    """A mixer that can take the place of softmax attention."""

    @classmethod
    def like(cls, shape: HeadShape) -> dict[str, Any]:
        """The options by which the mixer has heads of these sizes."""

    def inherited(self, softmax: SoftmaxWeights) -> dict[str, Tensor]:
        """The values of the parameters that begin from those of attention, by name, in their shapes."""


def expand(shape: HeadShape) -> float:
    """The option `expand_k` by which all heads together are H·K wide: int(dim * expand_k) rounds down."""
    wide = shape.heads * shape.head_dim
    factor = wide / shape.dim
    return factor if int(shape.dim * factor) == wide else math.nextafter(factor, math.inf)
