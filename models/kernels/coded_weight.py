"""A weight that is there as codes of few bits, in place of numbers.

It has the shape and the dtype of the weight that the codes were made of, so that its gradient, and whoever looks at its
form, are as before; but no numbers of that dtype exist. A recipe's product (`models.recipes`) reads the codes. Nothing
else may read it: a cast would hide that the weight was rounded.

Experts' weights [E, K, N] lie as one matrix of E·K rows, each expert with shares of its own.
"""

from typing import Any

import torch
from torch import Tensor

from models.kernels.low_precision import Codes, Scaling

_SAME = ("aten::detach", "aten::alias", "aten::view", "aten::as_strided")  # what sharding asks of a whole weight
_WITH_SHAPE = ("aten::view", "aten::as_strided")


def as_matrix(shape: torch.Size, scaling: Scaling) -> tuple[tuple[int, int], Scaling]:
    """The rows and columns that a weight [N, K] or [E, K, N] has as one matrix, and how that is scaled. scaling: of a
    matrix [N, K] that multiplies as `models.linear.Linear` has it; an expert's lies the other way round."""
    if len(shape) == 2:
        return (shape[0], shape[1]), scaling
    rows, columns = scaling.columns or shape[1], scaling.rows
    return (shape[0] * shape[1], shape[2]), scaling._replace(rows=rows, columns=columns)


class CodedWeight(Tensor):
    """codes: of the weight [N, K], or of experts' [E, K, N] as a matrix [E·K, N]. shape, dtype: of the weight that they
    were made of.

    Raises RuntimeError for an operator that would read numbers.
    """

    codes: Codes
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: Codes, shape: torch.Size, dtype: torch.dtype) -> "CodedWeight":
        made: CodedWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=codes.codes.device
        )
        made.codes = codes
        return made

    def __init__(self, codes: Codes, shape: torch.Size, dtype: torch.dtype):
        """Everything is done in `__new__`: `nn.Parameter` makes a copy of this object without it."""

    def matrices(self) -> list[Codes]:
        """The codes of each expert's matrix, [N, K] as a linear layer's."""
        count, rows, _ = self.shape
        scales = len(self.codes.scale) // count
        parts = zip(self.codes.codes.split(rows), self.codes.scale.split(scales), strict=True)
        # A share of all rows of an expert is a share of all rows of the matrix that the expert has alone.
        scaling = self.codes.scaling._replace(rows=0) if self.codes.scaling.rows == rows else self.codes.scaling
        return [Codes(codes, scale, scaling).transposed() for codes, scale in parts]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        if name in _SAME and (name not in _WITH_SHAPE or tuple(args[1]) == args[0].shape):
            return cls(args[0].codes, args[0].shape, args[0].dtype)
        if name == "aten::zeros_like":  # a gradient where there is none
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        raise RuntimeError(f"{name}: reads the numbers of a weight that is there as codes; only its recipe may read it")
