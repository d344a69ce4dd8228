"""A rank's part of a tensor that ranks share out, without an import of torch's DTensor: it takes a second."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def local(x: Tensor) -> Tensor:
    """This rank's part of it; a plain tensor as it is."""
    part: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part


class ByParts(TorchFunctionMode):
    """Within it, what each rank can do with its part alone is done with the part: copies of a tensor and of its form,
    `detach`, and `copy_` from one that is shared out alike. The result is shared out as the tensor is.

    For an operator over a whole tensor torch first looks for the placement of its result, once for each shape: at the
    start of a run that takes longer than the rest of building a small model.
    """

    OPERATORS = (torch.empty_like, torch.zeros_like, Tensor.clone, Tensor.detach)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.copy_ and not torch.is_grad_enabled() and _alike(*args[:2]):
            local(args[0]).copy_(local(args[1]), *args[2:], **kwargs)
            return args[0]
        if function not in self.OPERATORS or not hasattr(args[0], "to_local"):
            return function(*args, **kwargs)
        x = args[0]
        if function in (torch.empty_like, torch.zeros_like):  # of a weight whose part is bf16, as its gradients are
            kwargs.setdefault("dtype", x.dtype)
        part = function(local(x), *args[1:], **kwargs)
        whole: Any = type(x)
        return whole.from_local(part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def _alike(x: Any, y: Any) -> bool:
    """Says whether ranks share out two tensors in the same way."""
    if not (hasattr(x, "to_local") and hasattr(y, "to_local")):
        return False
    return bool((x.device_mesh, x.placements, x.shape) == (y.device_mesh, y.placements, y.shape))
