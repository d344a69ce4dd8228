"""Sizes of heads, checked where they enter, and keys that serve several heads of values."""

from torch import Tensor


def head_dim(dim: int, heads: int, *, what: str = "dim") -> int:
    """`dim` split over `heads`; a ValueError that names both when it does not divide."""
    if heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"heads={heads}: must divide {what}={dim}")
    return dim // heads


def repeat_heads(x_BTHK: Tensor, times: int) -> Tensor:
    """Each head `times` over, side by side: value head i reads with the key of head i // times."""
    return x_BTHK if times == 1 else x_BTHK.repeat_interleave(times, dim=2)
