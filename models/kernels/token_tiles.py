"""A span reduced slice of tokens by slice of tokens: what a kernel holds inside is that of one slice, at any length.

Of a slice only its inputs and the state that enters it are kept; the kernel runs again in the slice's backward pass.
It is `Begun` over any recurrence, since a slice is a span like any other: its effect composes, and its outputs need no
more than the state before it.
"""

from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.kernels.chunking import Begun, Effect


class Slices(Begun):
    """xs [B, T, ...] and starts [B, T] of a span, `tile` tokens at a time; `recurrence` reduces a slice whole."""

    def __init__(self, recurrence: Any, xs: tuple[Tensor, ...], starts: Tensor, tile: int):
        self.recurrence = recurrence
        self.slices = list(zip(*(x.split(tile, dim=1) for x in (starts, *xs)), strict=True))

    @cached_property
    def effect(self) -> Effect:
        recurrence = self.recurrence
        return reduce(recurrence.compose, (_again(_effect, recurrence, *parts) for parts in self.slices))

    def finish(self, state: Tensor | None) -> Tensor:
        outputs = []
        for parts in self.slices[:-1]:
            output, state = _again(_pass, self.recurrence, state, *parts)
            outputs.append(output)
        return torch.cat([*outputs, _again(_finish, self.recurrence, state, *self.slices[-1])], dim=1)


class Stretches(Begun):
    """The same with everything kept: a kernel's tensors stay small enough to be allocated without fresh pages."""

    def __init__(self, recurrence: Any, xs: tuple[Tensor, ...], starts: Tensor, tokens: int):
        self.recurrence = recurrence
        slices = zip(*(x.split(tokens, dim=1) for x in (starts, *xs)), strict=True)
        self.begun = [recurrence.begin(*parts, starts=own) for own, *parts in slices]

    @cached_property
    def effect(self) -> Effect:
        return reduce(self.recurrence.compose, (begun.effect for begun in self.begun))

    def ahead(self) -> None:
        for begun in self.begun:
            begun.ahead()

    def finish(self, state: Tensor | None) -> Tensor:
        outputs = []
        for begun in self.begun:
            outputs.append(begun.finish(state))
            state = self.recurrence.act(begun.effect, state)
        return torch.cat(outputs, dim=1)


# What runs again holds on to what it is called with, so these are no methods: `self` would keep all slices alive.


def _effect(recurrence: Any, starts: Tensor, *xs: Tensor) -> Effect:
    return recurrence.begin(*xs, starts=starts).effect


def _finish(recurrence: Any, state: Tensor | None, starts: Tensor, *xs: Tensor) -> Tensor:
    return recurrence.begin(*xs, starts=starts).finish(state)


def _pass(recurrence: Any, state: Tensor | None, starts: Tensor, *xs: Tensor) -> tuple[Tensor, Tensor]:
    begun = recurrence.begin(*xs, starts=starts)
    return begun.finish(state), recurrence.act(begun.effect, state)


def _again(f: Any, *inputs: Any) -> Any:
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False)
