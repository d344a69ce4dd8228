"""The dense feed-forward layer: SwiGLU (arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import positive
from models.linear import Linear
from models.sequence import Sequence


class SwiGLU(nn.Module):
    """(silu(x W1) ⊙ x W3) W2. hidden: columns of W1 and of W3.

    x [..., D] -> [..., D].
    """

    def __init__(self, *, dim: int, hidden: int):
        super().__init__()
        positive(dim=dim, hidden=hidden)
        self.gate_up = Linear(dim, 2 * hidden, axes=("ffn", "embed"))
        self.down = Linear(hidden, dim, axes=("embed", "ffn"))

    def transform(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, None]:
        return self.transform(x_BTD), None
