"""A store in memory, for tests that ask which tokens come when: every token has an id of its own."""

from pathlib import Path

import numpy as np

from data.batches import Batches, Sequencing
from data.curriculum import Curriculum
from data.samplers.sampler import Source

DOCUMENT = 0


class Tokens:
    """What `Batches` asks of a tokenizer."""

    DOCUMENT = DOCUMENT
    size = 1 << 40


class Store:
    """Documents of given lengths; token i of the store has id i + 1."""

    opened = False  # ids tell tokens apart, so none of them opens documents

    def __init__(self, folder: Path, lengths: list[int]) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.tokens = np.arange(1, self.offsets[-1] + 1)
        self.hashes = np.full(len(lengths), 1 << 63, dtype=np.uint64)
        self.hashes[-1] = 0  # the last is held out
        self.fingerprint = str(lengths)
        self.folder = folder / "store"


def batches(
    folder: Path, lengths: list[int], batch_tokens: int, *, curriculum: Curriculum | None = None, **changes: object
) -> Batches:
    """Of one store; the document that is held out is added."""
    chosen: dict = {
        "packing": "concat",
        "max_length": 64,
        "min_length": 8,
        "overlong": "random",
        "document_mask": True,
        "heldout": 0.01,
        "heldout_tokens": 64,
    } | changes
    store = Store(folder, [*lengths, 2 * chosen["max_length"]])
    return of([Source("", store)], batch_tokens, chosen, curriculum)


def of(sources: list[Source], batch_tokens: int, chosen: dict, curriculum: Curriculum | None = None) -> Batches:
    return Batches(
        sources,
        tokenizer=Tokens(),
        batch_tokens=batch_tokens,
        sequencing=Sequencing(**chosen),
        curriculum=curriculum,
    )
