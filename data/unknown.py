"""Text that a tokenizer has no token for: how much of a corpus it is, which a store's card says."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


def unknown(tokenizer: Any, contents: Sequence[bytes], ids: Sequence[NDArray[np.integer]]) -> int:
    """Counts the tokens of `ids`, the encoding of `contents`, that stand for text that the tokenizer does not know; of
    one that drops such text, how many characters it has dropped."""
    mark, text = getattr(tokenizer, "unknown_id", None), getattr(tokenizer, "text", None)
    if mark is not None:
        return sum(int(np.count_nonzero(piece == mark)) for piece in ids)
    if text is None or not _drops(text):  # bytes, ids, or a vocabulary that spells every byte
        return 0
    return sum(_dropped(text, content) for content in contents)


def _dropped(text: str, content: bytes) -> int:
    """Counts the characters, blanks apart, that no token spells."""
    shown = content.decode(errors="replace")
    spelled = np.zeros(len(shown) + 1, dtype=bool)
    for begin, end in _backend(text).encode(shown, add_special_tokens=False).offsets:
        spelled[begin:end] = True
    return sum(not known and not letter.isspace() for letter, known in zip(shown, spelled, strict=False))


@lru_cache(maxsize=4)
def _backend(text: str) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


@lru_cache(maxsize=4)
def _drops(text: str) -> bool:
    """True for a tokenizer.json without an unknown token that has no tokens for single bytes, either."""
    settings = json.loads(text)
    return not settings["model"].get("byte_fallback") and '"ByteLevel"' not in json.dumps(settings.get("pre_tokenizer"))
