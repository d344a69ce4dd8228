"""RG-LRU in the recurrent block of Griffin (De et al. 2024, 2402.19427, section 2.4): a gated elementwise recurrence.

h_t = a_t·h_{t-1} + √(1 - a_t²)·(i_t·x_t), log a_t = -8·softplus(Λ)·r_t; gates r, i from x by blocks; the block is
gelu(W_y x) · RG-LRU(conv(W_x x)). As in the authors' code, the first token of a document is multiplied by 1 instead of
√(1 - a²): the state before it has no variance to keep. Λ starts so that a^8 ~ U(0.9, 0.999), the paper's range.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import constant, declare, fan_in, positive
from models.conv import short_conv
from models.linear import Linear
from models.mixers.heads import head_dim
from models.precision import wide
from models.recurrence import Elementwise
from models.sequence import Sequence
from models.width import Units

SHARPNESS = 8.0  # c of the paper
STEEPEST = 1000.0  # bound on the derivative of the square root, as in the authors' code


class BoundedSqrt(torch.autograd.Function):
    """√x with a derivative of at most `STEEPEST`: 1/(2√x) is infinite where a gate is fully closed, a = 1."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (4 * x).clamp_min(STEEPEST**-2).rsqrt()


def slow_decay(low: float = 0.9, high: float = 0.999):
    """Λ with e^{-8·softplus(Λ)} uniform in [low, high]."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        rate = -torch.empty(shape).uniform_(low, high, generator=generator).log() / SHARPNESS
        return rate + (-torch.expm1(-rate)).log()

    return init


class RGLRU(nn.Module):
    """The state is dim * expand numbers, `dim` the model's.

    heads: blocks of channels, from each of which its own gates are computed; must divide dim * expand. expand: width of
    the recurrence in multiples of dim. conv: tokens that the short causal convolution before the recurrence sees, the
    present one included; it stays within the document; null for none. conv_bias: true gives it a bias; null for yes
    where there is one. bias: true gives the projections into and out of the recurrence biases, as in RecurrentGemma.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        expand: float = 1.0,
        conv: int | None = 4,
        conv_bias: bool | None = None,
        bias: bool = False,
    ):
        super().__init__()
        positive(dim=dim)
        self.units: Units = {"heads": heads}
        inner = int(dim * expand)
        block = head_dim(inner, heads, what="dim * expand")
        self.x = Linear(dim, inner, axes=("heads", "embed"), bias=bias)
        self.y = Linear(dim, inner, axes=("heads", "embed"), bias=bias)
        self.conv = short_conv(
            inner, conv, bias=conv is not None if conv_bias is None else conv_bias, activation=False, off=False
        )
        self.gates = declare(
            heads, block, 2 * block, axes=("heads", None, None), init=fan_in(block), parts=(block, block), along=2
        )
        self.gates_bias = declare(heads, 2 * block, axes=("heads", None), init=constant(0.0), decay=False)
        self.Lambda = declare(inner, axes=("heads",), init=slow_decay(), decay=False)
        self.out = Linear(inner, dim, axes=("embed", "heads"), bias=bias)
        self.recurrence = Elementwise("elementwise")

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        v_BTD = self.conv(self.x(x_BTD), seq, slot=slot)
        v_BTHK = v_BTD.unflatten(-1, (self.gates.shape[0], -1))
        gates_BTHK = torch.einsum("bthk,hkj->bthj", v_BTHK, self.gates.to(v_BTD.dtype))
        i_BTHK, r_BTHK = (wide(gates_BTHK) + wide(self.gates_bias)).sigmoid().chunk(2, dim=-1)
        g_BTD = -SHARPNESS * F.softplus(wide(self.Lambda)) * r_BTHK.flatten(-2)
        kept_BTD = BoundedSqrt.apply(-torch.expm1(2 * g_BTD)).masked_fill(seq.starts.unsqueeze(-1), 1.0)
        h_BTD = seq.scan(self.recurrence, kept_BTD * i_BTHK.flatten(-2) * v_BTD, g_BTD, slot=slot)
        return self.out(F.gelu(self.y(x_BTD), approximate="tanh") * h_BTD.to(x_BTD.dtype))
