"""The token shift of RWKV (2305.13048): a layer sees each token mixed, channel by channel, with the one before it."""

import torch
from torch import Tensor

from models.axes import Init
from models.sequence import Sequence


def previous(x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
    """The token before each, [B, T, D] -> [B, T, D]; zeros before the first of a document."""
    shifted_BTD = torch.cat((seq.before(x_BTD, 1, slot=slot), x_BTD[:, :-1]), dim=1)
    return shifted_BTD.masked_fill(seq.starts.unsqueeze(-1), 0.0)


def ramp(exponent: float, less: float = 0.0) -> Init:
    """1 - (i / D)^exponent - less [D]: how much of the token before enters channel i at the start."""
    return lambda shape, generator: 1 - (torch.arange(shape[0]) / shape[0]) ** exponent - less


def orthogonal(scale: float) -> Init:
    """Rows or columns at right angles, √(outputs / inputs) longer where a layer widens: RWKV's."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        gain = scale * max(1.0, shape[0] / shape[1]) ** 0.5
        return torch.nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=generator)

    return init
