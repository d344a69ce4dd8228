"""Sequences of one length, cut from documents; every epoch has all of them once, in an order of its own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

from data.samplers.documents import Documents
from data.samplers.index import Ints
from data.samplers.permute import Permutation

Key = tuple[int | str, ...]


@dataclass(frozen=True)
class Cut:
    """Lengths of the sequences that documents become: at most `longest` tokens, of buckets at least `shortest`, both
    powers of two there; `overlong`: what becomes of a document above twice the longest bucket's length."""

    longest: int
    shortest: int = 256
    overlong: str = "random"


class Pool(ABC):
    """`count` sequences of `length` tokens an epoch; `tokens` of documents in them, the rest is padding.

    `version` counts changes of what a sequence holds.
    """

    version = 1

    def __init__(self, documents: Documents, length: int, count: int, tokens: int) -> None:
        self.documents, self.length, self.count, self.tokens = documents, length, count, tokens

    def pieces(self, key: Key, index: int) -> Ints:
        """Sequence `index` of the endless row of epochs under a key: pieces [n, 2] of the store."""
        epoch, place = divmod(index, self.count)
        return self.sequence((*key, epoch), int(_order(self.count, *key, epoch, "order")([place])[0]))

    @abstractmethod
    def sequence(self, key: Key, number: int) -> Ints:
        """Sequence `number` of an epoch, as pieces of the store."""


@lru_cache(maxsize=64)
def _order(count: int, *key: int | str) -> Permutation:
    return Permutation(count, *key)
