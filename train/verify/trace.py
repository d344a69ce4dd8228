"""Traces: every tensor of some training steps by its place, in the order in which it is computed.

The tokens of a batch lie elsewhere in every layout. So what a layer gives is traced by a sum over all tokens, each
weighed by a function of its position in its document; ranks add their parts. The gradient of what a layer gives is
traced the same way.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUT, SCALAR, LOAD, OUTPUT_GRADIENT = "output", "scalar", "load", "gradient of the output"
GRADIENT, CLIPPED, WEIGHT = "gradient", "clipped gradient", "weight"
SUMMED = (OUTPUT, OUTPUT_GRADIENT)  # over ranks
OF_WEIGHTS = (GRADIENT, CLIPPED, WEIGHT)


class Place(NamedTuple):
    """The place of a tensor: the step, from 0; its kind, one of those above; the name of a weight or a layer."""

    step: int
    kind: str
    name: str

    def __str__(self) -> str:
        what = self.name if self.kind == SCALAR else f"{self.kind} of {self.name}"
        if self.kind == LOAD:
            what = f"choices of experts in {self.name}"
        return f"{what} in step {self.step + 1}"

    @property
    def suspect(self) -> str | None:
        """The layer whose work made it wrong where nothing before it is: the next one of a gradient of an output."""
        if self.kind != OUTPUT_GRADIENT:
            return self.layer
        return f"layers.{int(self.name.partition('.')[2]) + 1}"

    @property
    def layer(self) -> str | None:
        """The layer that it belongs to; None of what stands outside of them."""
        parts = self.name.split(".")
        return ".".join(parts[:2]) if parts[0] == "layers" else None


Trace = dict[Place, Tensor]


class Part(NamedTuple):
    """A rank's part of a weight: the stretches [begin, end) of dimension `along`, side by side."""

    along: int
    segments: list[tuple[int, int]]

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor."""
        return torch.cat([whole.narrow(self.along, b, e - b) for b, e in self.segments], dim=self.along)


class RankTrace(NamedTuple):
    """The trace of a rank. parts: of the weights of which it has less than a tensor, by name."""

    trace: Trace
    parts: dict[str, Part]


class Streams:
    """Sums over this process's counted tokens of each layer's output and of its gradient, float64 [D] by layer.

    share: (p, P) where P processes see the same tokens, and each has the p-th P-th of them between layers.
    """

    def __init__(self, layers: Mapping[str, nn.Module], share: tuple[int, int] = (0, 1)):
        self._share = share
        self._sums: dict[str, dict[str, Tensor]] = {OUTPUT: {}, OUTPUT_GRADIENT: {}}
        for name, layer in layers.items():
            layer.register_forward_hook(partial(self._see, f"layers.{name}"))

    def take(self) -> dict[str, dict[str, Tensor]]:
        """The sums since the last time, by kind and layer."""
        sums, self._sums = self._sums, {kind: {} for kind in self._sums}
        return sums

    def _see(self, layer: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        y_BTD, seq = output[0], args[1]
        again = torch._C._current_graph_task_id() != -1  # a layer that runs once more for its backward
        if again or not torch.is_grad_enabled():
            return
        weights = ((torch.cos(0.7 * seq.positions.double()) + 0.1) * seq.counted).flatten()
        (place, of), held = self._share, y_BTD.shape[-3:-1].numel()
        weights = F.pad(weights, (0, held * of - len(weights)))  # shares are equal, the last ones padded
        weights_BT = weights[held * place : held * (place + 1)].view(y_BTD.shape[-3:-1])
        self._add(OUTPUT, layer, weights_BT, y_BTD.detach())
        if y_BTD.requires_grad:
            hooks: list[Any] = []

            def once(gradient_BTD: Tensor) -> None:  # a backward pass in two halves comes by twice
                hooks.pop().remove()
                self._add(OUTPUT_GRADIENT, layer, weights_BT, gradient_BTD)

            hooks.append(y_BTD.register_hook(once))

    def _add(self, kind: str, layer: str, weights_BT: Tensor, x_BTD: Tensor) -> None:
        part = torch.einsum("bt,...btd->...d", weights_BT, x_BTD.double()).flatten()  # of several residual streams, too
        self._sums[kind][layer] = self._sums[kind].get(layer, 0.0) + part


class Moment(NamedTuple):
    """The tensors of one step, by name, as one process has them."""

    streams: dict[str, dict[str, Tensor]]
    scalars: dict[str, float]
    loads: dict[str, Tensor]
    gradients: dict[str, Tensor]
    clipped: dict[str, Tensor]
    weights: dict[str, Tensor]


def written(step: int, moment: Moment) -> Trace:
    """The trace of a step, in the order of computation."""

    def each(kind: str, layer: Mapping[str, Any]) -> Trace:
        return {Place(step, kind, name): torch.as_tensor(x, dtype=torch.float64).clone() for name, x in layer.items()}

    scalars = dict(moment.scalars)
    norm = {"gradient norm": scalars.pop("gradient norm")} if "gradient norm" in scalars else {}
    back = each(OUTPUT_GRADIENT, moment.streams[OUTPUT_GRADIENT]) | each(GRADIENT, moment.gradients)
    clipped = each(CLIPPED, moment.clipped)
    return (
        each(OUTPUT, moment.streams[OUTPUT])
        | each(LOAD, moment.loads)
        | each(SCALAR, scalars)
        | _backwards(back)
        | each(SCALAR, norm)
        | _backwards(clipped)
        | each(WEIGHT, moment.weights)
    )


def _backwards(results: Trace) -> Trace:
    """In the order of a backward pass: the head and the last norm; each layer from the last on, the gradient of its
    output before those of its weights; then the rest, as the embedding."""

    def depth(place: Place) -> tuple[int, bool]:
        if place.name.partition(".")[0] in ("head", "norm"):
            return -(1 << 30), False
        return (1 if place.layer is None else -int(place.layer.partition(".")[2])), place.kind == GRADIENT

    ordered = sorted(reversed(results), key=depth)
    return {place: results[place] for place in ordered}


class Difference(NamedTuple):
    """A tensor that two traces have at one place. error: 2-norm of the difference, over that of the tensor. excess: the
    same difference, over what rounding may move the tensor by; not right above 1. rank: the first that has it."""

    place: Place
    error: float
    excess: float
    rank: int


class Verdict(NamedTuple):
    """first: the first tensor that parts, in the order of computation; None where none does. worst: the one nearest
    to what rounding explains, or beyond. compared: number of tensors."""

    first: Difference | None
    worst: Difference
    compared: int


FACTOR = 20.0  # times what a perturbation moved
FLOOR = 1e-14  # of a tensor's norm, for one that no perturbation moved


def allowed(want: Trace, moved: list[tuple[Trace, Trace]]) -> dict[Place, float]:
    """The 2-norm by which rounding may move each tensor.

    moved: traces of the same run from weights that differ by rounding. A weight whose gradient is zero in theory has
    rounding alone for one, and is held to the gradients of its layer.
    """
    layers: dict[tuple[int, str, str | None], float] = {}
    for place, x in want.items():
        key = (place.step, place.kind, place.layer)
        layers[key] = math.hypot(layers.get(key, 0.0), _norm(x))
    limits = {}
    for place, x in want.items():
        scale = max(_norm(x), FLOOR * layers[place.step, place.kind, place.layer])
        limits[place] = FACTOR * max(_norm(a[place] - b[place]) for a, b in moved) + FLOOR * scale
    return limits


def compare(want: Trace, limits: Mapping[Place, float], ranks: list[RankTrace]) -> Verdict:
    """Holds the traces of all ranks to one. Raises ValueError where a trace has a place that the other lacks."""
    first, worst, count = None, None, 0
    for place, x in want.items():
        holding = [(rank, each.trace[place]) for rank, each in enumerate(ranks) if place in each.trace]
        if not holding:
            raise ValueError(f"no rank has the {place}")
        if place.kind in SUMMED:
            holding = [(0, sum((part for _, part in holding), torch.zeros_like(x)))]
        for rank, got in holding:
            part = ranks[rank].parts.get(place.name) if place.kind in OF_WEIGHTS else None
            expected = x if part is None else part.of(x)
            if got.shape != expected.shape:
                raise ValueError(
                    f"the {place} has shape {tuple(got.shape)} on rank {rank}, not {tuple(expected.shape)}"
                )
            distance = _norm(got - expected)
            distance = distance if math.isfinite(distance) else math.inf
            error, excess = (distance / max(size, 1e-300) for size in (_norm(x), limits[place]))
            difference = Difference(place, error, excess, rank)
            worst = difference if worst is None or difference.excess > worst.excess else worst
            first = difference if first is None and difference.excess > 1 else first
            count += 1
    if extra := [place for each in ranks for place in each.trace if place not in want]:
        raise ValueError(f"one process has no {extra[0]}")
    assert worst is not None
    return Verdict(first, worst, count)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double()))
