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

from models.kernels.chunk import Effect


class Slices:
    """xs [B, T, ...] and starts [B, T] of a span, `tile` tokens at a time; `recurrence` reduces a slice whole."""

    def __init__(self, recurrence: Any, xs: tuple[Tensor, ...], starts: Tensor, tile: int):
        self.recurrence = recurrence
        self.slices = list(zip(*(x.split(tile, dim=1) for x in (starts, *xs)), strict=True))

    @cached_property
    def effect(self) -> Effect:
        return reduce(self.recurrence.compose, (_again(self._effect, *parts) for parts in self.slices))

    def finish(self, state: Tensor | None) -> Tensor:
        outputs = []
        for parts in self.slices[:-1]:
            output, state = _again(self._pass, state, *parts)
            outputs.append(output)
        return torch.cat([*outputs, _again(self._finish, state, *self.slices[-1])], dim=1)

    def _effect(self, starts: Tensor, *xs: Tensor) -> Effect:
        return self.recurrence.begin(*xs, starts=starts).effect

    def _finish(self, state: Tensor | None, starts: Tensor, *xs: Tensor) -> Tensor:
        return self.recurrence.begin(*xs, starts=starts).finish(state)

    def _pass(self, state: Tensor | None, starts: Tensor, *xs: Tensor) -> tuple[Tensor, Tensor]:
        begun = self.recurrence.begin(*xs, starts=starts)
        return begun.finish(state), self.recurrence.act(begun.effect, state)


def _again(f: Any, *inputs: Tensor | None) -> Any:
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False)
