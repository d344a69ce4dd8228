"""Tokenizers: bytes in, token ids out."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Bytes:
    """The byte-level tokenizer: ids 0..255 are the bytes, and `DOCUMENT` opens every document.

    As a target, `DOCUMENT` closes the document before it.
    """

    name = "bytes"
    DOCUMENT = 256
    size = 257

    def encode(self, content: bytes) -> NDArray[np.uint16]:
        """Token ids, uint16 [len(content)]; no `DOCUMENT` is added."""
        return np.frombuffer(content, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: ArrayLike) -> bytes:
        """The bytes of integer token ids [T]; specials are dropped."""
        ids = np.asarray(ids)
        return ids[ids < self.DOCUMENT].astype(np.uint8).tobytes()
