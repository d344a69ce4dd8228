"""Every matmul with a weight goes through here: fp32 master weights, multiplied in the dtype of the activations."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import Init, constant, declare, fan_in


class Linear(nn.Module):
    """y = x Wᵀ (+ b). x [..., inputs] -> [..., outputs] in x's dtype; the weight is cast to it at use."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: tuple[str | None, str | None],
        bias: bool = False,
        init: Init | None = None,
    ):
        super().__init__()
        self.weight = declare(outputs, inputs, axes=axes, init=init or fan_in(inputs))
        self.bias = declare(outputs, axes=axes[:1], init=constant(0.0), decay=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
