"""Tokenizers: bytes in, token ids out. `TOKENIZERS` names them, so that a checkpoint's card finds its own again."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Bytes:
    """The byte-level tokenizer: ids 0..255 are the bytes, and `DOCUMENT` opens every document.

    As a target, `DOCUMENT` closes the document before it.
    """

    name = "bytes"
    DOCUMENT = 256
    size = 257

    def card(self) -> dict[str, Any]:
        """What a checkpoint keeps of its tokenizer: all that `from_card` needs, and what the special ids mean."""
        return {"name": self.name, "size": self.size, "special": {"document": self.DOCUMENT}}

    def encode(self, content: bytes) -> NDArray[np.uint16]:
        """Token ids, uint16 [len(content)]; no `DOCUMENT` is added."""
        return np.frombuffer(content, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: ArrayLike) -> bytes:
        """The bytes of integer token ids [T]; specials are dropped."""
        ids = np.asarray(ids)
        return ids[ids < self.DOCUMENT].astype(np.uint8).tobytes()


class Symbols:
    """The tokens of a generated task (`data.tasks`): they stand for nothing, and `DOCUMENT` is its mark.

    size: how many there are, the mark included.
    """

    name = "symbols"
    DOCUMENT = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def card(self) -> dict[str, Any]:
        """What a checkpoint keeps of them. `from_card` refuses it: there is no text to make tokens of."""
        return {"name": self.name, "size": self.size, "special": {"document": self.DOCUMENT}}


TOKENIZERS: dict[str, type[Bytes]] = {Bytes.name: Bytes}


def from_card(card: dict[str, Any]) -> Bytes:
    """The tokenizer that a checkpoint was trained with. Raises ValueError for one that this version does not have."""
    name = card.get("name")
    if name == Symbols.name:
        raise ValueError(f"tokenizer={name}: the symbols of a generated task spell no text")
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer={name}: not in this version, which has {', '.join(TOKENIZERS)}")
    found = TOKENIZERS[name]()
    if found.card() != card:
        raise ValueError(f"tokenizer={name}: its card says {card}, this version's {found.card()}")
    return found
