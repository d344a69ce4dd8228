"""Hybrids: a vocabulary of blocks and a pattern of their names, repeated down the layers."""


def unroll(pattern: list[str], layers: int, vocabulary: list[str]) -> list[str]:
    """The block name of each layer. Raises ValueError for an unknown name or an empty pattern."""
    if not pattern:
        raise ValueError("pattern=[]: needs at least one block name")
    for name in pattern:
        if name not in vocabulary:
            raise ValueError(f"pattern={list(pattern)}: {name!r} is not one of the blocks {', '.join(vocabulary)}")
    if layers < 1:
        raise ValueError(f"layers={layers}: must be at least 1")
    return [pattern[i % len(pattern)] for i in range(layers)]
