"""Memory of a step's backward pass: recomputation, tiles of tokens, the host's memory.

Every choice changes memory and time, never a number beyond rounding. Recomputing a layer repeats its collectives, in
the same order on every rank, since all ranks run the same layers; the policy `selective` keeps their results and sends
nothing twice.
"""

import ctypes
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    ActivationWrapper,
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from models.recompute import Tape
from models.recurrence import Recurrence
from parallel.collectives import NAMESPACE

RecomputePolicy = Literal["none", "full", "selective", "planned"]
RECOMPUTE = get_args(RecomputePolicy)

# What costs most to compute for the bytes that it holds. Products inside a chunk (bmm) are not here: they are large.
DEAR = {"mm", "addmm", "_grouped_mm"}
ATTENTION = "_scaled_dot_product_"

M_MMAP_THRESHOLD = -3  # of mallopt(3)
LARGE = 4 << 20  # bytes


def parameter_name(name: str) -> str:
    """A parameter's own name, without what the wrappers of layers insert."""
    return name.replace("_checkpoint_wrapped_module.", "")


def recompute(layers: nn.ModuleDict, policy: str, *, device: str = "cpu") -> None:
    """Wraps every layer: "full" keeps its input alone, "selective" also what is dear, "planned" does as "full" while
    `recompute_group` says so; "none" wraps nothing.

    Dear is what asks `models.recompute` on a CPU. Elsewhere it is what `keep` names: a policy asked for every operator
    sees kernels that are not ours, and Python is ahead of a GPU. Raises ValueError for another policy.
    """
    if policy not in RECOMPUTE:
        raise ValueError(f"engine.recompute={policy}: must be one of {', '.join(RECOMPUTE)}")
    if policy != "none" and device == "cpu":
        give_back(layers)
    chosen: dict[str, Any] = {}
    if policy == "selective":
        contexts = partial(create_selective_checkpoint_contexts, keep)
        chosen["context_fn"] = taped if device == "cpu" else contexts
    for name, layer in layers.items():
        if policy == "planned":
            layers[name] = PlannedRecompute(layer)
        elif policy != "none":
            layers[name] = checkpoint_wrapper(layer, **chosen)


class PlannedRecompute(CheckpointWrapper):
    """A layer that computes again in its backward pass where `again` is set when it runs forward."""

    again = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.again:
            return super().forward(*args, **kwargs)
        return self._checkpoint_wrapped_module(*args, **kwargs)


def recompute_group(layers: nn.ModuleDict, again: bool) -> None:
    """Sets whether the next forward pass of this rank's group keeps the layers' inputs alone, under "planned".

    Ranks of one group choose alike: a layer that runs again repeats the group's messages.
    """
    for layer in layers.values():
        for each in (layer, getattr(layer, "_checkpoint_wrapped_module", None)):
            if isinstance(each, PlannedRecompute):
                each.again = again


def give_back(layers: nn.ModuleDict) -> None:
    """Has glibc return to the system what this process frees: large tensors at once, the rest after each layer.

    Else the heap keeps the holes between what lives, and the process stays more than twice as large as what it holds.
    Fresh pages cost some time. Nothing happens with another C library.
    """
    if (trim := give_back_large()) is None:
        return
    for layer in layers.values():
        layer.register_forward_hook(partial(_after, trim))


def give_back_large() -> Any:
    """The first half of `give_back`: large tensors. Returns what does the rest, to be called; None without glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        limit, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return None
    limit(M_MMAP_THRESHOLD, LARGE)
    return trim


def _after(trim: Any, *_: Any) -> None:
    trim(0)


def taped() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a layer's first pass and of its second."""
    tape = Tape()
    return tape.recording(), tape.replay()


def keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy "selective": outputs of matmuls with weights, of fused attention and of collectives are kept."""
    namespace, _, name = operator.name().partition("::")
    name = name.partition(".")[0]
    dear = namespace == NAMESPACE or name in DEAR or name.startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def tile(model: nn.Module, tokens: int) -> None:
    """Feed-forwards and recurrences take `tokens` at a time: modules with an attribute `tile`, or a recurrence."""
    for module in model.modules():
        if hasattr(module, "tile"):
            module.tile = tokens  # type: ignore[assignment]
        for name, declared in list(vars(module).items()):
            if isinstance(declared, Recurrence):
                setattr(module, name, replace(declared, tile=tokens))


class OnHost(ActivationWrapper):
    """A layer whose saved activations wait in the host's memory, pinned where that makes the copies faster.

    Parameters stay where they are: sharding frees and gathers them by itself. On a CPU nothing is copied.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        held = {p.untyped_storage().data_ptr() for p in self.parameters()}
        with saved_tensors_hooks(partial(to_host, held=held), from_host):
            return self._checkpoint_wrapped_module(*args, **kwargs)


def to_host(x: Tensor, *, held: set[int]) -> tuple[torch.device, Tensor]:
    """(where it was, itself on the host), but for what is on the host or shares the storage of a parameter."""
    if x.device.type == "cpu" or x.untyped_storage().data_ptr() in held:
        return x.device, x
    host = torch.empty(x.shape, dtype=x.dtype, layout=x.layout, pin_memory=True)
    return x.device, host.copy_(x)


def from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, x = packed
    return x.to(device, non_blocking=True)


def offload(layers: nn.ModuleDict) -> None:
    """Wraps every layer so that what it saves waits on the host. After `recompute`: what that drops is not moved."""
    for name, layer in layers.items():
        layers[name] = OnHost(layer)
