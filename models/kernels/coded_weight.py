"""A weight that is there as codes of few bits, in place of numbers.

It has the shape and the dtype of the weight that the codes were made of, so that its gradient, and whoever looks at its
form, are as before; but no numbers of that dtype exist. A recipe's product (`models.recipes`) reads the codes. Nothing
else may read it: a cast would hide that the weight was rounded.
"""

from typing import Any

import torch
from torch import Tensor

from models.kernels.low_precision import Codes

_SAME = ("aten::detach", "aten::alias", "aten::as_strided")  # what sharding asks of a weight once it is whole


class CodedWeight(Tensor):
    """codes: of the weight [N, K]. dtype: of the weight that they were made of.

    Raises RuntimeError for an operator that would read numbers.
    """

    codes: Codes
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: Codes, dtype: torch.dtype) -> "CodedWeight":
        made: CodedWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.codes.shape, dtype=dtype, device=codes.codes.device
        )
        made.codes = codes
        return made

    def __init__(self, codes: Codes, dtype: torch.dtype):
        """Everything is done in `__new__`: `nn.Parameter` makes a copy of this object without it."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        if name in _SAME and (name != "aten::as_strided" or tuple(args[1]) == args[0].shape):
            return cls(args[0].codes, args[0].dtype)
        if name == "aten::zeros_like":  # a gradient where there is none
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        raise RuntimeError(f"{name}: reads the numbers of a weight that is there as codes; only its recipe may read it")
