"""How a token reaches its experts: the contract between the router, the experts, and whoever placed the experts.

Legend: N tokens, D model width, E experts, X choices a token (top-k), M = N·X rows in expert order.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Sent(NamedTuple):
    """Rows grouped by expert, and what is needed to bring them back."""

    rows: Tensor  # [M, D], expert after expert
    offsets: Tensor  # [E] int32, where each expert's rows end
    order: Tensor  # [M] int64, row -> flat index into [N, X]


class Dispatch(Protocol):
    """`Here` keeps the experts on this device; an all-to-all will answer the same two calls across ranks."""

    def send(self, x: Tensor, experts: Tensor, num_experts: int) -> Sent:
        """x [N, D] to the experts [N, X] of each token."""
        ...

    def collect(self, rows: Tensor, sent: Sent, weights: Tensor) -> Tensor:
        """Expert outputs [M, D] back to their tokens, summed with weights [N, X] -> [N, D]."""
        ...


class Here:
    """Every expert is on this device: sorting is all it takes."""

    def send(self, x: Tensor, experts: Tensor, num_experts: int) -> Sent:
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=num_experts)
        rows = x.index_select(0, order // experts.shape[1])
        return Sent(rows, counts.cumsum(0).to(torch.int32), order)

    def collect(self, rows: Tensor, sent: Sent, weights: Tensor) -> Tensor:
        N, X = weights.shape
        by_token = rows.index_select(0, sent.order.argsort()).view(N, X, -1)
        return (by_token * weights.unsqueeze(-1).to(rows.dtype)).sum(1)
