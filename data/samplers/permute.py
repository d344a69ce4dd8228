"""Keyed bijections: an order of any number of things that is computed place by place and never stored.

A balanced Feistel network over the smallest even number of bits that holds them (Luby and Rackoff 1988), and where it
leads outside, again from there until it does not (cycle walking: Black and Rogaway, CT-RSA 2002): fewer than four
rounds of it a place on average. The keys are a hash of what names the order, so a run meets the same one for ever.
"""

import hashlib
import json

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))  # MurmurHash3's finaliser


class Permutation:
    """An order of 0..size-1 under a key of numbers and texts."""

    version = 1

    def __init__(self, size: int, *key: int | str) -> None:
        if size < 1:
            raise ValueError(f"size={size}: must be at least 1")
        self.size = size
        half = max((size - 1).bit_length() + 1, 2) // 2
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        self._keys = np.frombuffer(digest(*key, count=ROUNDS), dtype="<u8").astype(np.uint64)

    def __call__(self, places: ArrayLike) -> NDArray[np.int64]:
        """The values at these places, int64 of their shape. Raises ValueError for a place outside 0..size-1."""
        return self._walk(places, self._keys)

    def inverse(self, values: ArrayLike) -> NDArray[np.int64]:
        """The places of these values."""
        return self._walk(values, self._keys[::-1], backwards=True)

    def _walk(self, places: ArrayLike, keys: NDArray[np.uint64], backwards: bool = False) -> NDArray[np.int64]:
        given = np.asarray(places)
        if given.size and not 0 <= given.min() <= given.max() < self.size:
            raise ValueError(f"places {given.min()} to {given.max()} of an order of {self.size}")
        images = self._network(given.astype(np.uint64).ravel(), keys, backwards)
        while (outside := np.flatnonzero(images >= np.uint64(self.size))).size:
            images[outside] = self._network(images[outside], keys, backwards)
        return images.astype(np.int64).reshape(given.shape)

    def _network(self, x: NDArray[np.uint64], keys: NDArray[np.uint64], backwards: bool) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in keys:
            if backwards:
                left, right = right ^ self._scramble(left, key), left
            else:
                left, right = right, left ^ self._scramble(right, key)
        return (left << self._half) | right

    def _scramble(self, x: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
        x = x ^ key
        for factor in _MIX:
            x = (x ^ (x >> np.uint64(33))) * factor
        return (x ^ (x >> np.uint64(33))) & self._mask


def digest(*key: int | str, count: int = 1) -> bytes:
    """`count` x 8 bytes that a key of numbers and texts decides."""
    return hashlib.shake_256(json.dumps(key).encode()).digest(8 * count)


def number(limit: int, *key: int | str) -> int:
    """A number in 0..limit-1 that a key decides."""
    return int.from_bytes(digest(*key, count=2), "little") % limit
