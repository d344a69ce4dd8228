"""Few lengths for many: the buckets that round sequences up by the fewest tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def optimal_buckets(lengths: Sequence[int], most: int) -> list[int]:
    """The upper bounds, ascending, of at most `most` buckets; a sequence counts as its bucket's bound.

    Exact: best[b][j], the fewest added tokens of the j shortest distinct lengths in b buckets, is the least over i of
    best[b-1][i] and what rounding the i-th to the j-th up to the j-th adds. O(most · n²) for n distinct lengths.
    Raises ValueError for no bucket or no length.
    """
    if most < 1 or not len(lengths):
        raise ValueError(f"{most} buckets for {len(lengths)} lengths: at least one of each is needed")
    values, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    n = len(values)
    many = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.concatenate([[0], np.cumsum(counts * values)])
    best = np.full(n + 1, np.inf)
    best[0] = 0
    cut = np.zeros((min(most, n) + 1, n + 1), dtype=np.int64)
    for b in range(1, min(most, n) + 1):
        after = np.full(n + 1, np.inf)
        for j in range(b, n + 1):
            added = best[:j] + values[j - 1] * (many[j] - many[:j]) - (tokens[j] - tokens[:j])
            cut[b, j] = int(added.argmin())
            after[j] = added[cut[b, j]]
        best = after
    bounds, j = [], n
    for b in range(min(most, n), 0, -1):
        bounds.append(int(values[j - 1]))
        j = int(cut[b, j])
    return bounds[::-1]


def rounded_up(lengths: Sequence[int], bounds: Sequence[int]) -> list[int]:
    """Each length as the bound of its bucket."""
    edges = np.asarray(bounds)
    return edges[np.searchsorted(edges, np.asarray(lengths))].tolist()
