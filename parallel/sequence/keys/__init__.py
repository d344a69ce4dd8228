"""Transports of softmax attention: how a query reaches the keys of its document on other ranks."""

from parallel.sequence.keys.gather import GatherKeys
from parallel.sequence.keys.mesh import MeshKeys, Ring, Ulysses
from parallel.sequence.keys.visible import Keys

__all__ = ["GatherKeys", "Keys", "MeshKeys", "Ring", "Ulysses"]
