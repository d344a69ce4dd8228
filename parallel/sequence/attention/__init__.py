"""Transports of softmax attention: how a query reaches the keys of its document on other ranks."""

from parallel.sequence.attention.all_gather import GatherKeys
from parallel.sequence.attention.ring_ulysses import MeshKeys, Ring, Ulysses
from parallel.sequence.attention.visibility import Keys

__all__ = ["GatherKeys", "Keys", "MeshKeys", "Ring", "Ulysses"]
