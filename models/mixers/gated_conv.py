"""A short convolution between two gates, as in LFM2 (2511.23404): y = W_out (c ⊙ conv(b ⊙ x)), [b, c, x] = W_in u.

It is all that the layer knows of the past: its state is the last few inputs of the convolution.
"""

from torch import Tensor, nn

from models.axes import positive
from models.conv import ShortConv
from models.linear import Linear
from models.sequence import Sequence
from models.width import Units


class GatedConv(nn.Module):
    """The state is dim * (conv - 1) numbers, `dim` the model's.

    heads: has no meaning here, where each channel is convolved by itself; accepted so that any mixer can take another's
    place. conv: tokens that the causal convolution sees, the present one included; it stays within the document.
    bias: true adds one to the convolution and to both projections.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(self, *, dim: int, heads: int | None = None, conv: int = 3, bias: bool = False):
        super().__init__()
        positive(dim=dim, conv=conv)
        self.units: Units = {"heads": None}
        self.into = Linear(dim, 3 * dim, axes=("heads", "embed"), parts=(dim, dim, dim), bias=bias)
        self.conv = ShortConv(dim, conv, bias=bias, activation=False)
        self.out = Linear(dim, dim, axes=("embed", "heads"), bias=bias)

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        b_BTD, c_BTD, u_BTD = self.into(x_BTD).chunk(3, dim=-1)
        y_BTD: Tensor = self.out(c_BTD * self.conv(b_BTD * u_BTD, seq, slot=slot))
        return y_BTD
