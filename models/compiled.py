"""A layer that torch.compile fuses, but for what asks its sequence.

Only what a layer computes from its own tensors is compiled: norms, products, gates, sums. Its questions to the
sequence, its collectives and its experts run as they are: they depend on documents, ranks and counts, which change from
step to step, and a compiler that looked into them would compile anew each time. A layer is compiled in place, by its
`forward`: its parameters have the names that they had, and hooks around the layer, FSDP's among them, run as they are.

All layers of a kind share what is compiled, because a layer's name is no part of it. The number of tokens is a constant
for the first length and a symbol from the second on, so that packed sequences of any lengths compile each piece of code
twice. `LIMIT` bounds how often else; beyond it a piece of code runs as it is.

Importing this module imports torch's compiler.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from models.conv import ShortConv
from models.kernels.pieces import Piece
from models.moe import MoE
from models.nonlinear_recurrence import Serial
from models.positions import Positions
from models.recompute import Tape, current, using
from models.recurrence import Recurrence
from models.sequence import Sequence

LIMIT = 16  # times that a piece of code is compiled
AS_THEY_ARE = (MoE, ShortConv)  # counts of rows, and masks where documents begin: numbers that the host reads


class Asked:
    """The sequence that a compiled layer is given: `seq` answers every question, uncompiled.

    name: the layer's, which its slots begin with. tape: the one on which `seq`'s results are kept.
    """

    decoding = False

    def __init__(self, seq: Sequence, name: str, tape: Tape | None):
        self.seq, self.name, self.tape = seq, name, tape
        self.positions, self.documents, self.counted, self.starts = (
            seq.positions,
            seq.documents,
            seq.counted,
            seq.starts,
        )

    @torch.compiler.disable
    def before(self, x: Tensor, width: int, *, slot: str) -> Tensor:
        with using(self.tape):
            return self.seq.before(x, width, slot=self.name + slot)

    @torch.compiler.disable
    def scan(self, recurrence: Recurrence | Serial, *xs: Tensor, slot: str) -> Tensor:
        with using(self.tape):
            return self.seq.scan(recurrence, *xs, slot=self.name + slot)

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, slot: str, **seen: Any) -> Tensor:
        with using(self.tape):
            return self.seq.attend(q, k, v, slot=self.name + slot, **seen)

    @torch.compiler.disable
    def sum(self, x: Tensor) -> Tensor:
        with using(self.tape):
            return self.seq.sum(x)

    @torch.compiler.disable
    def rotation(self, positions: Positions, head_dim: int) -> tuple[Tensor, Tensor]:
        return positions.rotation(self.seq, head_dim)

    @property
    def pieces(self) -> list[list[Piece]]:
        return self.seq.pieces

    def __getattr__(self, name: str) -> Any:
        return getattr(self.seq, name)


class CompiledLayer:
    """The forward pass of a layer in training; where no gradient is taken the layer runs as it is.

    layer: a `models.Block`. backend, options: as torch.compile has them.
    """

    def __init__(self, layer: nn.Module, *, backend: Any = "inductor", options: dict[str, Any] | None = None):
        self.name: str = layer.slot  # type: ignore[assignment]
        self.named = [m for m in layer.modules() if isinstance(getattr(m, "slot", None), str)]
        self.plain = layer.forward
        for module in layer.modules():
            if isinstance(module, AS_THEY_ARE):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        self.fused = torch.compile(layer.forward, backend=backend, options=options, recompile_limit=LIMIT)  # type: ignore[call-overload]

    def __call__(self, x_BTD: Tensor, seq: Sequence, *handed: Any, **coupled: Any) -> Any:
        if seq.decoding or not torch.is_grad_enabled():
            return self.plain(x_BTD, seq, *handed, **coupled)
        asked = Asked(seq, self.name, current())
        with using(None), self.unnamed():
            return self.fused(x_BTD, asked, *handed, **coupled)

    @contextmanager
    def unnamed(self) -> Iterator[None]:
        """Has the layer and its parts name their slots without the layer's name."""
        names = [vars(module)["slot"] for module in self.named]
        try:
            for module, name in zip(self.named, names, strict=True):
                vars(module)["slot"] = name.removeprefix(self.name)
            yield
        finally:
            for module, name in zip(self.named, names, strict=True):
                vars(module)["slot"] = name


def compile_layer(layer: nn.Module, *, backend: Any = "inductor", options: dict[str, Any] | None = None) -> None:
    """Has this layer run compiled in training, in place."""
    layer.forward = CompiledLayer(layer, backend=backend, options=options)  # type: ignore[method-assign]


def prepare_compiler(device: str) -> None:
    """Has code that the compiler fails on run as it is, with a warning; on CPUs the compiler works in this process,
    since the ranks beside it have the other cores."""
    torch._dynamo.config.suppress_errors = True
    if device == "cpu":
        torch._inductor.config.compile_threads = 1


def compiled_pieces() -> int:
    """Pieces of code that this process has compiled."""
    return int(counters["stats"]["unique_graphs"])
