"""A span streamed through its kernel, some chunks at a time, and forgotten on the way.

The states between tiles are kept, and what costs most; the backward pass computes the rest of a tile again from its
inputs. So a scan holds little more memory than its inputs and outputs, and what it works on stays in the processor's
caches: tensors as long as a sequence of 64k tokens spend more time on fresh pages of memory than on arithmetic.

Legend: B spans, T tokens, H heads, K key width, V value width, W columns of the state.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.kernels.chunking import Begun
from models.precision import wide

TILE = 2048  # tokens of all spans together

# (xs, starts, state [B,H,K,W], memo) -> outputs [B,T,H,W], state after. An empty memo is filled with what costs more to
# compute than to keep; a full one is used.
Step = Callable[[tuple[Tensor, ...], Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor]]


class Stream(torch.autograd.Function):
    """Outputs [B, T, H, W] and last state of `step` over xs, tile after tile."""

    @staticmethod
    def forward(ctx: Any, step: Step, tile: int, starts: Tensor, state: Tensor, *xs: Tensor) -> tuple[Tensor, Tensor]:
        outs: list[Tensor] = []
        entering: list[Tensor] = []
        memos: list[list[Tensor]] = []
        for begin in range(0, starts.shape[1], tile):
            part = slice(begin, begin + tile)
            entering.append(state)
            memos.append([])
            out, state = step(tuple(x[:, part] for x in xs), starts[:, part], state, memos[-1])
            outs.append(out)
        ctx.step, ctx.tile = step, tile
        ctx.save_for_backward(starts, *xs, *entering, *(x for memo in memos for x in memo))
        ctx.inputs, ctx.tiles = len(xs), len(entering)
        return torch.cat(outs, 1), state

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        starts, *saved = ctx.saved_tensors
        xs, entering, states = saved[: ctx.inputs], saved[ctx.inputs :][: ctx.tiles], saved[ctx.inputs + ctx.tiles :]
        each = len(states) // ctx.tiles
        gradients = [torch.empty_like(x) for x in xs]
        for i in reversed(range(len(entering))):
            part = slice(i * ctx.tile, (i + 1) * ctx.tile)
            leaves = [x[:, part].detach().requires_grad_() for x in xs]
            state = entering[i].detach().requires_grad_()
            with torch.enable_grad():
                out, last = ctx.step(tuple(leaves), starts[:, part], state, states[i * each : (i + 1) * each])
            d_state, *parts = torch.autograd.grad((out, last), (state, *leaves), (d_out[:, part], d_state))
            for whole, piece in zip(gradients, parts, strict=True):
                whole[:, part] = piece
        return None, None, None, d_state, *gradients


class Streamed(Begun):
    """A begun span of a rule whose kernel is `step`. xs are [B, T, ...], queries, keys and values first.

    How an effect is come by, and what is added to the outputs from zero for a state that comes later, is the rule's.
    """

    def __init__(self, step: Step, *xs: Tensor, starts: Tensor, chunk: int):
        self.step, self.xs, self.starts, self.chunk = step, xs, starts, chunk
        self.dtype, (self.K, self.V) = xs[2].dtype, (xs[1].shape[-1], xs[2].shape[-1])
        self._open: tuple[Tensor, Tensor] | None = None  # outputs and last state, from zero

    def _run(self, state: Tensor) -> tuple[Tensor, Tensor]:
        B, T = self.starts.shape
        tile = max(TILE // B // self.chunk, 1) * self.chunk
        if tile >= T:
            return self.step(self.xs, self.starts, state, [])
        return Stream.apply(self.step, tile, self.starts, state, *self.xs)  # type: ignore[no-untyped-call]

    def _zero(self) -> Tensor:
        v = self.xs[2]
        return wide(v.new_zeros(v.shape[0], v.shape[2], self.K, self.V))

    @abstractmethod
    def _past(self, state: Tensor) -> Tensor:
        """The gain of the outputs [B, T, H, V] from `state`."""

    def finish(self, state: Tensor | None) -> Tensor:
        if self._open is None:
            return self._run(self._zero() if state is None else state)[0].to(self.dtype)
        out = self._open[0][..., : self.V]
        return (out if state is None else out + self._past(state)).to(self.dtype)
