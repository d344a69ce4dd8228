"""Sizes of heads, checked where they enter."""


def head_dim(dim: int, heads: int, *, what: str = "dim") -> int:
    """`dim` split over `heads`; a ValueError that names both when it does not divide."""
    if heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"heads={heads}: must divide {what}={dim}")
    return dim // heads
