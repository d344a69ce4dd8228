"""The dense feed-forward layer: SwiGLU (arXiv 2002.05202), all tokens at once or a tile of them at a time."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.axes import positive
from models.kept import unkept
from models.linear import Linear
from models.sequence import Sequence


def tiled(f: Callable[[Tensor], Tensor], x: Tensor, tile: int | None) -> Tensor:
    """f(x) for an `f` that treats each token by itself, `tile` of them at a time (None: all); x [..., D] -> [..., O].

    Of a tile only the input is kept, and `f` runs again in its backward pass: what `f` holds inside is that of one
    tile, however long the sequence (tiled MLP, Arctic long sequence training, 2506.13996).
    """
    if tile is None:
        return f(x)
    tiles = x.flatten(0, -2).split(tile)
    again = partial(checkpoint, partial(unkept, f), use_reentrant=False, preserve_rng_state=False)
    y = torch.cat([again(x_ND) for x_ND in tiles])
    return y.view(*x.shape[:-1], -1)


class SwiGLU(nn.Module):
    """(silu(x W1) ⊙ x W3) W2. hidden: columns of W1 and of W3.

    x [..., D] -> [..., D]; of the attribute `tile` tokens at a time, unless it is None.
    """

    def __init__(self, *, dim: int, hidden: int):
        super().__init__()
        positive(dim=dim, hidden=hidden)
        self.tile: int | None = None
        self.gate_up = Linear(dim, 2 * hidden, axes=("ffn", "embed"))
        self.down = Linear(hidden, dim, axes=("embed", "ffn"))

    def transform(self, x: Tensor) -> Tensor:
        return tiled(self._gated, x, self.tile)

    def _gated(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, None]:
        return self.transform(x_BTD), None
