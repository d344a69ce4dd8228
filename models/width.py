"""Access of a module to the channels that other devices hold: the counterpart of `Sequence` for heads and widths.

A layer may be divided: a device then holds some heads of its mixer, some of the hidden channels of its feed-forward,
some rows of the vocabulary. A module is written once, as if it held all of them. It asks its attribute `width` where it
needs more than its own: for the sum of what every device has a part of, and for the place of its own among all.
`Undivided` answers where one device holds everything; `parallel.tensor.DividedWidth` answers across ranks.

Between `enter` and `leave` every device sees all tokens, and what it makes of them is its part of a sum. Outside of
them it sees its own share of the tokens, whole. A parameter that is not divided therefore has, everywhere, a gradient
that is a part of a sum too.

A module says by its attribute `units` how far it can be divided: by the name of an axis the number of parts of it that
must stay whole, as heads; None where every channel can go by itself.

Legend: B spans on this device, T tokens a span, D model width, N channels, V vocabulary.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from models.kernels.cross_entropy import Scored, cross_entropy, score

Units = dict[str, int | None]


class Width(Protocol):
    """Questions that a module may ask about the channels. All collectives, if any, happen inside these methods."""

    def span(self, total: int) -> tuple[int, int]:
        """[begin, end), this device's of `total` heads or channels."""
        ...

    def enter(self, x: Tensor, rows: tuple[int, int]) -> Tensor:
        """All tokens [B, T, D], `rows` = (B, T), from this device's share of them."""
        ...

    def leave(self, y: Tensor) -> Tensor:
        """This device's share of the tokens of Σ y over devices, y [B, T, D]."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Σ x over devices, on each of them."""
        ...

    def place(self, x: Tensor, total: int) -> Tensor:
        """[..., N] at its place among `total` channels, zeros elsewhere: what `leave` and `sum` then put together."""
        ...

    def join(self, x: Tensor, total: int) -> Tensor:
        """All `total` channels, on every device, from this one's [..., N]."""
        ...

    def alike(self, x: Tensor) -> Tensor:
        """The same x, which every device has computed alike and which counts once: its gradient is shared out."""
        ...

    def embed(self, tokens: Tensor, table: Tensor, vocabulary: int) -> Tensor:
        """The rows of the table [V, D] for tokens [B, T]: this device's part of them [B, T, D]."""
        ...

    def cross_entropy(
        self, x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, *, chunk: int | None, softcap: float | None
    ) -> Tensor:
        """As `models.kernels.cross_entropy.cross_entropy`."""
        ...

    def score(
        self, x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, *, chunk: int | None, softcap: float | None
    ) -> Scored:
        """As `models.kernels.cross_entropy.score`."""
        ...


class Undivided:
    """One device holds all channels."""

    def span(self, total: int) -> tuple[int, int]:
        return 0, total

    def enter(self, x: Tensor, rows: tuple[int, int]) -> Tensor:
        return x

    def leave(self, y: Tensor) -> Tensor:
        return y

    def sum(self, x: Tensor) -> Tensor:
        return x

    def place(self, x: Tensor, total: int) -> Tensor:
        return x

    def join(self, x: Tensor, total: int) -> Tensor:
        return x

    def alike(self, x: Tensor) -> Tensor:
        return x

    def embed(self, tokens: Tensor, table: Tensor, vocabulary: int) -> Tensor:
        return F.embedding(tokens, table)

    def cross_entropy(
        self, x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, *, chunk: int | None, softcap: float | None
    ) -> Tensor:
        return cross_entropy(x, weight, targets, chunk=chunk, softcap=softcap)

    def score(
        self, x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, *, chunk: int | None, softcap: float | None
    ) -> Scored:
        return score(x, weight, targets, chunk=chunk, softcap=softcap)


UNDIVIDED = Undivided()


def split(x: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """[..., N] in parts whose widths are as these, where a device holds an equal share of each."""
    total, here = sum(widths), x.shape[-1]
    return x.split([width * here // total for width in widths], dim=-1)
