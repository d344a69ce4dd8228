"""Links between layers: their places in the stack, and the parameters that couple them.

A coupling is a parameter [layers, width] with a row for each layer that asks for it. It belongs to the model and not to
a layer, since every row depends on all of them: sharding by layers then gathers it once, for the whole forward pass,
and a row reaches its layer as an argument, so that running a layer again finds the same one.

An activation can couple layers too: a mixer with an attribute `hands`, a name, is called by its method `handing`, which
takes what the first layer of that name made and returns None beside its output; the first takes None, and returns it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.axes import Init, declare
from models.hyper import Hyper
from models.width import Units


class Depth(NamedTuple):
    """A layer's place in the stack: `layer` from 0 of `layers`. attnres_block: of how many layers a block of attention
    residuals is (`models.attnres`); None without these. hyper: its residual streams (`models.hyper`); None for one."""

    layer: int
    layers: int
    attnres_block: int | None = None
    hyper: Hyper | None = None

    @property
    def opens(self) -> bool:
        """True for a layer that begins such a block."""
        return self.attnres_block is not None and self.layer % self.attnres_block == 0

    @property
    def sums(self) -> int:
        """Counts the embedding and the sums of the blocks before that of this layer."""
        return 0 if self.attnres_block is None else self.layer // self.attnres_block + 1

    def stream(self, *shape: int) -> tuple[int, ...]:
        """The shape of what layers hand to the next, of that of one residual stream."""
        return shape if self.hyper is None else (self.hyper.streams, *shape)


ALONE = Depth(0, 1)


def build_with(build: Callable[..., nn.Module], *, dim: int, **facts: Any) -> nn.Module:
    """build(dim=dim), with those of the facts too that its signature asks for: most layers need not know."""
    parameters = inspect.signature(build).parameters
    return build(dim=dim, **{name: fact for name, fact in facts.items() if name in parameters})


@dataclass(frozen=True)
class Coupling:
    """A request of a mixer, in its attribute `couplings`: its forward gets its layer's row as the argument `name`.

    `rows` makes of the parameter [layers, width] the rows, one a layer in the order of depth: a Tensor [width] each,
    or None where the layer needs none.
    """

    name: str
    width: int
    axis: str | None
    init: Init
    rows: Callable[[Tensor], Sequence[Tensor | None]]


class Coupled(nn.Module):
    """The couplings of a stack: layers that ask for the same name and width share a parameter. A layer that asks alone
    has nobody to share with, and gets no row."""

    def __init__(self, layers: nn.ModuleDict):
        super().__init__()
        self.units: Units = {"heads": None}  # a layer that asks says itself how its heads go
        asking: dict[str, list[tuple[str, Coupling]]] = {}
        for name, layer in layers.items():
            for coupling in getattr(layer, "couplings", ()):
                asking.setdefault(f"{coupling.name}_{coupling.width}", []).append((name, coupling))
        self.asking = {key: several for key, several in asking.items() if len(several) > 1}
        for key, several in self.asking.items():
            _, first = several[0]
            axes = (None, first.axis)
            self.register_parameter(key, declare(len(several), first.width, axes=axes, init=first.init, decay=False))

    def forward(self) -> dict[str, dict[str, Tensor | None]]:
        """Returns for each layer its rows, by argument."""
        given: dict[str, dict[str, Tensor | None]] = {}
        for key, layers in self.asking.items():
            _, first = layers[0]
            for (name, coupling), row in zip(layers, first.rows(self.get_parameter(key)), strict=True):
                given.setdefault(name, {})[coupling.name] = row
        return given
