"""The bytes that a layer's tensors hold while it trains, read off the layer: run on the meta device, storages counted.

Nothing is computed there, and every operator makes storages of the sizes that it would make elsewhere. They are counted
from their making to their end, so that what a forward pass leaves for the backward, and the most that either holds at a
time, come out as they are, without a formula that could be wrong. A fused kernel of a device makes fewer than the
reference kernels that run here.

Bytes are affine in the tokens once these are many: what does not grow with them are gradients of weights, and weights
cast to another dtype. So a line through two numbers of tokens is as good beyond them (`between`), where both lie beyond
what a kernel takes at a time (`models.recurrence.Recurrence.stretch`).
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.accounting import Traced, by_shape
from models.cross_layer import Depth
from models.lm import LM
from models.moe import balance
from models.mtp import Ahead
from models.recompute import Tape

SAMPLES = (128, 512, 1024, 2048, 4096, 6144)  # tokens between which lines are drawn

# Takes outputs, their gradients, inputs and weights; fills the inputs' gradients, returns what the weights' half needs.
Inputs = Callable[[list[Tensor], list[Tensor], list[Tensor], Iterator[nn.Parameter]], Any]


class Footprint(NamedTuple):
    """Bytes of one layer, besides its input and its weights.

    saved: left by the forward pass for the backward, its output among them. output: of these, the output. dear: of
    these, the results that selective recomputation keeps. forward: the most at a time in the forward pass. plain: the
    same where nothing is left. backward: the most at a time in the backward pass, from what was saved to the gradients.
    gradients: of its weights, whole. half: left by a backward pass for the inputs alone, for that of the weights, 0
    where passes are whole; its most at a time is `backward` then. sums: of `saved`, those of blocks of layers
    (`models.attnres`), which no recomputation lets go.
    """

    saved: float
    output: float
    dear: float
    forward: float
    plain: float
    backward: float
    gradients: float
    half: float = 0.0
    sums: float = 0.0

    def under(self, recompute: str) -> tuple[float, float, float, float]:
        """Bytes saved, the most in the forward and in the backward pass, and those left by half of that, under
        `engine.recompute`.

        What is saved of a layer is counted in its backward pass, and not twice.
        """
        if recompute == "full":
            kept = self.output + self.sums
            return kept, self.plain, self.backward, kept + max(0.0, self.half - self.saved)
        if recompute == "selective":
            return self.output + self.dear + self.sums, self.plain + self.dear, self.backward, 0.0  # refused in halves
        return self.saved, self.forward, self.backward, self.half


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is entered: `now`, and the `most` at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def footprints(
    model: LM, tokens: int, *, device: str = "cpu", ranks: int = 1, shared: bool = False, inputs: Inputs | None = None
) -> tuple[list[Footprint], Footprint]:
    """Those of each layer of a model on the meta device, and of its norm, head and loss, with whole modules of
    multi-token prediction, whatever these compute again; layers alike are run once.

    tokens: of a rank. device: see `models.accounting.account`. ranks: that share out the tokens between layers
    (`models.width`). shared: a sequence is, with other ranks. inputs: the first half of a backward pass, of layers
    whose passes are taken in two. Raises NotImplementedError for a layer whose course depends on data.
    """
    rows, by_kind, layers = model.coupled(), dict[Any, Footprint](), []
    for kind, (name, layer) in zip(model.kinds, model.layers.items(), strict=True):
        depth, shape = model.depths[int(name)], (1, -(-tokens // ranks), model.dim)
        alike = (kind, depth.sums, depth.opens, *(p.shape for p in layer.parameters()))
        if alike not in by_kind:
            run = _layer(layer, rows.get(name, {}), depth, shape, model.compute)
            seq = Traced.of_length(tokens, shared=shared)
            stream = depth.stream(*shape)
            found = _traced(run, layer, model, seq, stream, device=device, inputs=inputs)
            sums = float(depth.opens and depth.sums * math.prod(shape) * model.compute.itemsize)
            by_kind[alike] = found._replace(sums=sums)
        layers.append(by_kind[alike])
    seq, shape = Traced.of_length(tokens), (1, -(-tokens // ranks), model.dim)
    return layers, _traced(_head(model), model, model, seq, shape, device=device, layer=False)


def between(tokens: int, low: int, a: Footprint, high: int, b: Footprint) -> Footprint:
    """On the line through the footprints of `low` and `high` tokens, or beyond them; never below 0."""
    share = (tokens - low) / (high - low)
    return Footprint(*(max(0.0, x + (y - x) * share) for x, y in zip(a, b, strict=True)))


Run = Callable[[Tensor, Traced], Tensor]


def _layer(layer: nn.Module, rows: Mapping[str, Any], depth: Depth, shape: tuple[int, ...], dtype: torch.dtype) -> Run:
    """Runs a layer; the sums of blocks that it reads are made by the first layer of a block, for all of it."""

    def sums() -> Tensor:
        return torch.empty((depth.sums, *shape), dtype=dtype, device="meta", requires_grad=True)

    if not depth.sums:
        return lambda x_BTD, seq: layer(x_BTD, seq, **rows)[0]
    if depth.opens:
        return lambda x_BTD, seq: layer(x_BTD, seq, past=sums(), **rows)[0]
    past = sums()
    return lambda x_BTD, seq: layer(x_BTD, seq, past=past, **rows)[0]


def _head(model: LM) -> Run:
    def run(x_BTD: Tensor, seq: Traced) -> Tensor:
        rows = (seq.positions.shape[0], seq.positions.shape[1])
        zeros_BT = torch.zeros(rows, dtype=torch.long, device="meta")
        ahead = torch.stack([zeros_BT] * model.mtp_layers) if model.mtp_layers else None
        output = model.finish(x_BTD, balance({}, seq), seq, zeros_BT, None if ahead is None else Ahead(ahead, ahead))
        assert output.cross_entropy is not None
        return output.cross_entropy if output.ahead is None else output.cross_entropy + output.ahead.sum()

    return run


def _traced(
    run: Run,
    module: nn.Module,
    model: LM,
    seq: Traced,
    shape: tuple[int, ...],
    *,
    device: str,
    layer: bool = True,
    inputs: Inputs | None = None,
) -> Footprint:
    """Runs it forward without a graph, forward noting dear results, and forward and backward, on an input of this
    shape."""
    elsewhere = set() if layer else {id(p) for p in model.layers.parameters()}
    parameters = [p for p in module.parameters() if id(p) not in elsewhere]
    x_BTD = torch.empty(shape, dtype=model.compute, device="meta", requires_grad=True)
    try:
        with by_shape(module, device), _without_gradients(parameters):
            with LiveBytes() as alone:
                with torch.no_grad():
                    y = run(x_BTD, seq)
                del y
            tape = Tape()
            if layer:
                with tape.recording(), torch.no_grad():
                    y = run(x_BTD, seq)
                del y
            with LiveBytes() as live:
                y = run(x_BTD, seq)
                saved, forward, output = live.now, live.most, y.untyped_storage().nbytes()
                live.most = live.now
                gradient, left = torch.empty_like(y), None
                if inputs is None:
                    torch.autograd.backward([y], [gradient])
                else:
                    left = inputs([y], [gradient], [x_BTD], module.parameters())
                del y, gradient
                x_BTD.grad = None
                half = 0.0 if left is None else float(live.now)
                del left
            gradients = sum(p.grad.numel() * p.grad.itemsize for p in parameters if p.grad is not None)
    except RuntimeError as error:  # what the meta device cannot do
        raise NotImplementedError(f"memory: {(str(error).splitlines() or [''])[0]}") from error
    return Footprint(saved, output, tape.bytes, forward, alone.most, live.most, gradients, half)


@contextlib.contextmanager
def _without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p in parameters:
            p.grad = None
