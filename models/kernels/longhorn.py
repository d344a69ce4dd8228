"""Longhorn (Liu et al. 2024, 2407.14207): an elementwise recurrence over D×N, read over N by a query.

S_t = (1 - Δ_t k_t²)·S_{t-1} + Δ_t x_t k_tᵀ, y_t = S_t q_t: the diagonal of the online least-squares update. The states
of all tokens, [T, D, N], are N times the layer's activations, so they exist for one block of tokens at a time: the pass
keeps the state at each block's border, and the backward pass walks the block again from there.

Legend: B spans, T tokens, M runs of `STEPS` tokens, C tokens a run, D channels, N the state's width.
"""

from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.kernels.chunk import Effect, scaled
from models.kernels.elementwise import Scan, chunked
from models.precision import wide

STEPS, RUNS = 16, 16  # a block is RUNS runs that step side by side through STEPS tokens


class Blocks:
    """A span. q, k [B,T,N], v, delta [B,T,D] with delta·‖k‖² < 1, starts [B,T] -> [B,T,D]; `recurrence.Elementwise`.

    The state is [B, D, N].
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, *, starts: Tensor, scale: float | None = None):
        self.T, self.dtype = v.shape[1], v.dtype
        folded = [chunked(wide(x), STEPS) for x in (k, v, delta, scaled(q, scale))]
        self.blocks = list(zip(*(x.split(RUNS, dim=1) for x in (chunked(starts, STEPS), *folded)), strict=True))
        self.zero = v.new_zeros(v.shape[0], v.shape[-1], k.shape[-1], dtype=folded[0].dtype)
        self.alive = (~starts.any(1)).to(self.zero.dtype)

    @cached_property
    def effect(self) -> Effect:
        A = state = self.zero
        for starts, k, v, delta, _ in self.blocks:
            A, state = _again(_effect, A, state, starts, k, v, delta)
        return Effect(A, state, self.alive)

    def finish(self, state: Tensor | None) -> Tensor:
        state, outs = self.zero if state is None else state, []
        for block in self.blocks:
            out, state = _again(_outputs, state, *block)
            outs.append(out)
        return torch.cat(outs, dim=1).flatten(1, 2)[:, : self.T].to(self.dtype)


def _again(block, *xs: Tensor) -> tuple[Tensor, Tensor]:
    """block(*xs), whose inside is computed again when the gradient is."""
    return checkpoint(block, *xs, use_reentrant=False, preserve_rng_state=False)


def _states(state: Tensor, starts: Tensor, k: Tensor, v: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The states [B,M,C,D,N] of a block entered with `state` [B,D,N], and what each token forgets, Δk²."""
    forgotten = delta.unsqueeze(-1) * k.square().unsqueeze(-2)
    a = (1 - forgotten).masked_fill(starts[..., None, None], 0.0)
    u = (delta * v).unsqueeze(-1) * k.unsqueeze(-2)
    return Scan.apply(a, a.detach().prod(2), u, state), forgotten


def _outputs(state: Tensor, starts: Tensor, k: Tensor, v: Tensor, delta: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    S, _ = _states(state, starts, k, v, delta)
    return (S @ q.unsqueeze(-1)).squeeze(-1), S[:, -1, -1].clone()


def _effect(A: Tensor, state: Tensor, starts: Tensor, k: Tensor, v: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    S, forgotten = _states(state, starts, k, v, delta)
    below_one = forgotten.clamp(max=1 - torch.finfo(k.dtype).eps)  # it is in exact arithmetic
    return A + torch.log1p(-below_one).sum((1, 2)), S[:, -1, -1].clone()
