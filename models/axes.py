"""A parameter says three things about itself where it is created: the meaning of its axes, how it starts, and whether
weight decay applies. `parallel/` maps axis names to the mesh, `train/` reads the rest; no module is told a rank.

A parameter starts from (seed, its own name) alone, on the logical tensor: the same numbers at any world size, in any
order of construction, and whatever else the model contains.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# rank: the inside of a product of two matrices, where it widens with the model; of a fixed number it has no name.
AXES = ("batch", "seq", "embed", "heads", "kv_heads", "groups", "ffn", "vocab", "expert", "stage", "rank")

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Declared:
    """The declaration of a parameter: one axis name (or None) a dimension, its initial value, and weight decay.

    matrix: whether its last two dimensions are a matrix that multiplies vectors: filters are none. parts: sizes of the
    matrices that lie side by side in it, as q, k and v do, along the dimension `along`, again and again where they take
    turns, as the keys and values of heads do; () for one matrix. inputs: the dimension along which a matrix takes in
    what it multiplies; 0 for a table, of which a token takes a row.
    """

    axes: tuple[str | None, ...]
    init: Init
    decay: bool
    matrix: bool = True
    parts: tuple[int, ...] = ()
    along: int = 0
    inputs: int = 1


def declare(
    *shape: int,
    axes: tuple[str | None, ...],
    init: Init,
    decay: bool = True,
    matrix: bool = True,
    parts: tuple[int, ...] = (),
    along: int = 0,
    inputs: int = 1,
) -> nn.Parameter:
    """An uninitialised parameter that carries its declaration as `.declared`."""
    if len(axes) != len(shape) or any(a is not None and a not in AXES for a in axes):
        raise ValueError(
            f"axes {axes} do not name the {len(shape)} dimensions of a parameter; known: {', '.join(AXES)}"
        )
    if parts and shape[along] % sum(parts):
        raise ValueError(f"parts {parts} do not fill the {shape[along]} of dimension {along}")
    parameter = nn.Parameter(torch.empty(*shape))
    parameter.declared = Declared(axes, init, decay, matrix, parts, along, inputs)  # type: ignore[attr-defined]
    return parameter


def positive(**sizes: float) -> None:
    """Raises ValueError naming the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")


def declarations(model: nn.Module) -> dict[str, Declared]:
    """Every parameter's declaration by name. Read it before parallelisation replaces the parameters."""
    return {name: p.declared for name, p in model.named_parameters()}  # type: ignore[attr-defined]


def number(seed: int, name: str) -> int:
    """A number below 2^63 that a seed and a name have for themselves."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def initial(seed: int, name: str, declared: Declared, shape: tuple[int, ...]) -> Tensor:
    """The starting value of one parameter: fp32 [*shape] on the CPU, a function of (seed, name) only."""
    generator = torch.Generator("cpu").manual_seed(number(seed, name))
    return declared.init(tuple(shape), generator)


def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Fills an unsharded model in place, each parameter in its own dtype. Returns the model."""
    with torch.no_grad():
        for name, declared in declarations(model).items():
            parameter = model.get_parameter(name)
            parameter.copy_(initial(seed, name, declared, tuple(parameter.shape)))
    return model


def start_buffers(model: nn.Module, device: str) -> None:
    """Puts every buffer on `device` with its first value, which memory that follows the meta device does not hold.

    Raises TypeError for a module that has buffers and no method `start_buffers`.
    """
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not hasattr(module, "start_buffers"):
                raise TypeError(f"{type(module).__name__} has buffers, and must say in start_buffers() how they start")
            setattr(module, name, torch.empty_like(buffer, device=device))
        if next(module.buffers(recurse=False), None) is not None:
            module.start_buffers()  # type: ignore[operator]


def normal(std: float) -> Init:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def uniform(bound: float) -> Init:
    """U(-bound, bound)."""
    return lambda shape, generator: torch.empty(shape).uniform_(-bound, bound, generator=generator)


def fan_in(dim: int, gain: float = 1.0) -> Init:
    """Normal with variance gain² / dim: unit-variance inputs give outputs of variance gain²."""
    return normal(gain * dim**-0.5)


def scaled(init: Init, factor: float) -> Init:
    return lambda shape, generator: init(shape, generator) * factor


def constant(value: float) -> Init:
    return lambda shape, generator: torch.full(shape, value)


def log_uniform_rate(low: float, high: float) -> Init:
    """log of U(low, high): `A_log` of the Mamba-2 family. `low` > 0 keeps the draw from log 0 = -inf."""
    return lambda shape, generator: torch.empty(shape).uniform_(low, high, generator=generator).log()


def softplus_inverse_of_log_uniform(low: float, high: float, floor: float = 1e-4) -> Init:
    """softplus⁻¹(dt), dt log-uniform in [low, high]: `dt_bias` of the Mamba-2 family."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        dt = torch.empty(shape).uniform_(math.log(low), math.log(high), generator=generator).exp().clamp_min(floor)
        return dt + (-torch.expm1(-dt)).log()

    return init
