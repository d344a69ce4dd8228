"""Hybrids: a vocabulary of blocks and a pattern of their names, repeated down the layers."""

from typing import Any

MOST_LAYERS = 1024  # the deepest that were published have a thousand (2203.00555)


def unroll(pattern: list[str], layers: int, vocabulary: list[str]) -> list[str]:
    """The block name of each layer. Raises ValueError for an unknown name or an empty pattern."""
    if not pattern:
        raise ValueError("pattern=[]: needs at least one block name")
    for name in pattern:
        if name not in vocabulary:
            raise ValueError(f"pattern={list(pattern)}: {name!r} is not one of the blocks {', '.join(vocabulary)}")
    if not 1 <= layers <= MOST_LAYERS:
        raise ValueError(
            f"layers={layers}: must be at least 1" + (f", and at most {MOST_LAYERS:,}" if layers > 1 else "")
        )
    return [pattern[i % len(pattern)] for i in range(layers)]


def dense_front(first_k_dense: int, dense: Any, layers: int) -> dict[int, dict[str, Any]]:
    """Maps each of the first layers to its extra arguments: `dense` as its feed-forward.

    Raises ValueError where there are not as many layers, or no `dense`.
    """
    if not 0 <= first_k_dense <= layers:
        raise ValueError(f"first_k_dense={first_k_dense}: must lie between 0 and layers={layers}")
    if first_k_dense and dense is None:
        raise ValueError(f"first_k_dense={first_k_dense}: must be 0 without dense, the feed-forward of those layers")
    return {i: {"ffn": dense} for i in range(first_k_dense)}
