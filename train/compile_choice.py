"""The layers of a run that are compiled: all of them, or those kinds that compiled code makes faster on this machine.

`auto` runs a layer of each kind, whole and by itself, on rank 0: as it is and compiled, forward and backward, in turn,
on as many tokens as a rank has of a step, in two documents. The faster one is taken, on every rank. A kind that cannot
run by itself, or that the compiler fails on, runs as it is.
"""

import copy
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.axes import Declared, declarations, initial, start_buffers
from models.lm import LM
from models.sequence import Whole
from train.engines.refusals import COMPILERS
from train.measure_costs import seconds_of
from train.precision import dtypes
from train.run_config import RunConfig

FEWEST, MOST = 64, 4096  # tokens that a layer is measured on
ROUNDS = 3


class Measured(NamedTuple):
    """Seconds of a layer's forward and backward pass, the least of some rounds; why: it could not be measured."""

    plain: float = 0.0
    compiled: float = 0.0
    why: str = ""

    @property
    def pays(self) -> bool:
        return not self.why and self.compiled < self.plain

    def __str__(self) -> str:
        if self.why:
            return f"as it is ({self.why})"
        which = "compiled" if self.pays else "as it is"
        return f"{which} ({1e3 * self.plain:.3g} ms as it is, {1e3 * self.compiled:.3g} ms compiled)"


def lacking(device: str) -> str | None:
    """Names the part of torch.compile that this machine lacks, in a few words; None where nothing is missing."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    own = os.environ.get("CXX")
    names = [own] if own else COMPILERS
    return None if any(map(shutil.which, names)) else f"there is no C++ compiler ({', '.join(names)})"


def compile_layers(config: RunConfig, model: LM, device: torch.device, say: Callable[[str], None]) -> None:
    """Has the layers of a model on the meta device run compiled, as engine.compile says. Collective; all ranks take
    the same choice."""
    how = config.engine.get("compile", "none")
    if how == "none":
        return
    lack: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lack, lacking(device.type))
    if missing := next(filter(None, lack), None):
        say(f"engine.compile={how}: {missing}, and the run goes on without")
        return
    from models.compiled import LIMIT, compile_layer, compiled_pieces, prepare_compiler

    prepare_compiler(device.type)
    options = {"triton.cudagraphs": True} if config.engine.get("cuda_graphs") else None
    kinds = {kind: model.layers[str(model.kinds.index(kind))] for kind in dict.fromkeys(model.kinds)}
    chosen, told = set(kinds), "all layers compiled at their first step"
    if how == "auto":
        began, found = time.monotonic(), [dict[str, Measured]()]
        tokens = min(max(max(config.train.ramp.sizes) // dist.get_world_size(), FEWEST), MOST)
        if dist.get_rank() == 0:
            compute, master = dtypes(config.precision.compute, device.type)
            found = [
                {
                    kind: measured(layer, model.dim, tokens, device, compute, master, options)
                    for kind, layer in kinds.items()
                }
            ]
        dist.broadcast_object_list(found)
        chosen = {kind for kind, each in found[0].items() if each.pays}
        each = "; ".join(f"{kind} {measure}" for kind, measure in found[0].items())
        told = (
            f"{each}; a layer of {tokens:,} tokens, {time.monotonic() - began:.0f} s of warm-up, {compiled_pieces()} "
            "pieces of code"
        )
    say(f"engine.compile={how}: {told}; a piece is compiled {LIMIT} times at most")
    ahead = config.model.get("mtp_block") or model.kinds[-1]
    layers: list[tuple[str, Any]] = [(kind, model.layers[str(i)]) for i, kind in enumerate(model.kinds)]
    layers += [(ahead, module.block) for module in model.mtp.values()]
    for kind, layer in layers:
        if kind in chosen:
            compile_layer(layer, options=options)


def measured(
    layer: nn.Module,
    dim: int,
    tokens: int,
    device: torch.device,
    compute: torch.dtype,
    master: torch.dtype,
    options: dict[str, Any] | None = None,
    backend: Any = "inductor",
) -> Measured:
    """Runs a copy of a layer on the meta device as it is and compiled, in turn."""
    from models.compiled import compile_layer

    sides = [copy.deepcopy(layer).to_empty(device=device).to(master) for _ in range(2)]
    x_BTD = torch.randn(1, tokens, dim, device=device, dtype=compute, requires_grad=True)
    positions = torch.cat([torch.arange(n, device=device) for n in (tokens - tokens // 3, tokens // 3)])[None]
    try:
        for side in sides:
            start_buffers(side, device.type)
            _fill(side, declarations(layer))  # a parameter forgets its declaration on its way to a device
        compile_layer(sides[1], backend=backend, options=options)
        steps = [_step(side, x_BTD, positions) for side in sides]
        for step in steps:
            step()
        times = [[seconds_of(step, device) for step in steps] for _ in range(ROUNDS)]
    except Exception as error:  # of a compiler, of a library below it, or of a layer that asks for others
        return Measured(why=f"cannot be measured alone: {' '.join(str(error).split())[:80]}")
    plain, compiled = (min(side) for side in zip(*times, strict=True))
    return Measured(plain, compiled)


def _fill(layer: nn.Module, declared: dict[str, Declared]) -> None:
    with torch.no_grad():
        for name, each in declared.items():
            parameter = layer.get_parameter(name)
            parameter.copy_(initial(0, name, each, tuple(parameter.shape)))


def _step(layer: nn.Module, x_BTD: Tensor, positions_BT: Tensor) -> Callable[[], None]:
    def once() -> None:
        y_BTD = layer(x_BTD, Whole.of(positions_BT))[0]
        y_BTD.backward(torch.ones_like(y_BTD))
        layer.zero_grad()

    return once
