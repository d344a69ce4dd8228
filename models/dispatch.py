"""The way of a token to its experts: the contract between the router, the experts, and whoever placed the experts.

Legend: N tokens, D model width, E experts, X choices a token (top-k), M = N·X rows in expert order.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Sent(NamedTuple):
    """Rows grouped by expert, and what is needed to bring them back."""

    rows: Tensor  # [M, D], expert after expert; fewer where choices were dropped
    offsets: Tensor  # [E] int32, where each expert's rows end, of the experts that are here
    order: Tensor  # [M] int64, row -> flat index into [N, X] of the device that sent it
    journey: Any = None  # of rows that come from other devices: where they are from


class Dispatch(Protocol):
    """`Here` keeps the experts on this device; `parallel.expert.Exchange` answers the same calls across ranks.

    A choice of `num_experts` is of no expert, that of a dropped token: it is not sent, and brings nothing back.
    """

    def held(self, weight: Tensor) -> Tensor:
        """Returns the part of a weight [E, ...] that is of this device's experts."""
        ...

    def send(self, x: Tensor, experts: Tensor, num_experts: int, room: int | None) -> Sent:
        """x [N, D] to the experts [N, X] of each token. The rows may still be on their way.

        room: the most choices of one expert on any device, where that is known without looking at them.
        """
        ...

    def receive(self, sent: Sent) -> Sent:
        """Waits for the rows [M, D] of this device's experts."""
        ...

    def collect(self, rows: Tensor, sent: Sent, weights: Tensor) -> Tensor:
        """Expert outputs [M, D] back to their tokens, summed with weights [N, X] -> [N, D]."""
        ...


class Dispatched(nn.Module):
    """A layer that sends its tokens to experts by `dispatch`: the parameters of `experts` are one weight of each."""

    num_experts: int
    experts: nn.Module
    dispatch: Dispatch


class Here:
    """Every expert is on this device: sorting is all it takes.

    dropping: whether choices may be of no expert; a device waits for their number then.
    """

    def __init__(self, *, dropping: bool = False):
        self.dropping = dropping

    def send(self, x: Tensor, experts: Tensor, num_experts: int, room: int | None) -> Sent:
        sorted_, order = experts.flatten().sort(stable=True)
        each = torch.arange(num_experts, device=x.device)
        offsets = torch.searchsorted(sorted_, each, right=True, out_int32=True)
        if self.dropping:
            order = order[: int(offsets[-1])]
        return Sent(x.index_select(0, order // experts.shape[1]), offsets, order)

    def held(self, weight: Tensor) -> Tensor:
        return weight

    def receive(self, sent: Sent) -> Sent:
        return sent

    def collect(self, rows: Tensor, sent: Sent, weights: Tensor) -> Tensor:
        return combined(rows, sent.order, weights)


def combined(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Rows [M, D], of which each is of the choice `order` [M] says, summed over a token's with weights [N, X]."""
    N, X = weights.shape
    if len(order) == N * X:
        by_token = rows.index_select(0, order.argsort())
    else:
        by_token = rows.new_zeros(N * X, rows.shape[1]).index_copy(0, order, rows)
    return (by_token.view(N, X, -1) * weights.unsqueeze(-1).to(rows.dtype)).sum(1)


def by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choices [N, X] in expert order, tokens in their own order within an expert, and how many each expert has.

    Flat indices into [N, X], those of no expert (`num_experts`) last, and counts [E], int64 both.
    """
    flat = experts.flatten()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)  # a device's bincount would wait
    return flat.argsort(stable=True), counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
