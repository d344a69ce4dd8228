"""Parts that the chunked kernels share: they fold time into chunks, and mask tokens inside one.

Legend: B spans, T tokens, H heads, N chunks, C tokens a chunk. Kernels work on [B, H, N, C, ...] or
[N, B, H, C, ...].
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Effect(NamedTuple):
    """The action of a span on the state that enters it: S_out = alive·A·S_in + U."""

    A: Tensor  # [B, ...], as the kind of recurrence keeps it
    U: Tensor  # [B, H, K, V], or what else the kind's state is
    alive: Tensor  # [B], 1 where no document starts in the span, else 0; in U's dtype


class Begun(Protocol):
    """A span whose outputs wait for the incoming state. Kernels inherit from it, and so have an `ahead`."""

    @property
    def effect(self) -> Effect:
        """The action of the span on a state, computed at its first use."""
        ...

    def ahead(self) -> None:
        """Computes of the outputs what waits for no state, while that is on its way. Here nothing: for kinds whose
        effect takes all that their outputs from a zero state do, or whose outputs are the states."""
        return

    def finish(self, state: Tensor | None) -> Tensor:
        """Outputs [B, T, H, V] of the span entered with `state` [B, H, K, V] (None: zero)."""
        ...


def scaled(q: Tensor, scale: float | None) -> Tensor:
    """q times `scale`, K^-½ where it is None."""
    return q * (q.shape[-1] ** -0.5 if scale is None else scale)


def fold(x_BTH: Tensor, size: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, N, C, ...]; the last chunk is filled with zeros, which are no-ops to every kernel."""
    B, T, H, *rest = x_BTH.shape
    pad = -T % size
    if pad:
        x_BTH = F.pad(x_BTH, [0, 0] * (len(rest) + 1) + [0, pad])
    return x_BTH.reshape(B, (T + pad) // size, size, H, *rest).movedim(3, 1).contiguous()


def unfold(x_BHNC: Tensor, T: int) -> Tensor:
    """[B, H, N, C, ...] -> [B, T, H, ...]."""
    B, H, N, C, *rest = x_BHNC.shape
    return x_BHNC.movedim(1, 3).reshape(B, N * C, H, *rest)[:, :T]


def chunks(x_BTH: Tensor, size: int) -> Tensor:
    """[B, T, H, ...] -> [N, B, H, C, ...]: as `fold`, with the chunks first, so that each is contiguous."""
    B, T, H, *rest = x_BTH.shape
    pad = -T % size
    if pad:
        x_BTH = F.pad(x_BTH, [0, 0] * (len(rest) + 1) + [0, pad])
    return x_BTH.reshape(B, (T + pad) // size, size, H, *rest).movedim(0, 1).movedim(3, 2).contiguous()


def unchunks(x_NBHC: Tensor, T: int) -> Tensor:
    """[N, B, H, C, ...] -> [B, T, H, ...]."""
    return unfold(x_NBHC.movedim(0, 2), T)


class Segments(NamedTuple):
    """Document boundaries inside chunks. All are [B, 1, N, ...] and broadcast over heads."""

    visible: Tensor  # [B, 1, N, C, C] bool: s ≤ t in the same document
    first: Tensor  # [B, 1, N, C] bool: no document has started yet in the chunk; the incoming state is its past
    last: Tensor  # [B, 1, N, C] bool: no document starts after this token, the outgoing state is its future
    alive: Tensor  # [B, 1, N] bool: no document starts in the chunk


def segments(starts_BT: Tensor, size: int) -> Segments:
    folded = fold(starts_BT.long().unsqueeze(-1), size)
    index = folded.cumsum(-1)
    causal = torch.ones(size, size, dtype=torch.bool, device=index.device).tril()
    visible = (index.unsqueeze(-1) == index.unsqueeze(-2)) & causal
    return Segments(visible, index == 0, index == index[..., -1:], index[..., -1] == 0)


def seen_in(starts_BT: Tensor, size: int) -> Segments:
    """`segments` for what `chunks` has folded: all are [N, B, 1, ...]."""
    return Segments(*(x.movedim(2, 0) for x in segments(starts_BT, size)))
