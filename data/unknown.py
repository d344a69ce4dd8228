"""Text that a tokenizer has no token for: how much of a corpus it is, which a store's card says."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


def unknown(tokenizer: Any, contents: Sequence[bytes], ids: Sequence[NDArray[np.integer]]) -> int:
    """How many tokens of `ids`, what `contents` were encoded to, stand for text that the tokenizer does not know; of
    one that drops such text, how many characters it has dropped."""
    text = getattr(tokenizer, "text", None)
    if text is None:  # bytes, ids: all of them are known
        return 0
    mark, drops = _of(text)
    if mark is not None:
        return sum(int(np.count_nonzero(found == mark)) for found in ids)
    return sum(_dropped(text, content) for content in contents) if drops else 0


def _dropped(text: str, content: bytes) -> int:
    """How many characters, blanks apart, no token spells."""
    shown = content.decode(errors="replace")
    spelled = np.zeros(len(shown) + 1, dtype=bool)
    for begin, end in _backend(text).encode(shown, add_special_tokens=False).offsets:
        spelled[begin:end] = True
    return sum(not known and not letter.isspace() for letter, known in zip(shown, spelled, strict=False))


@lru_cache(maxsize=4)
def _backend(text: str) -> Any:
    from tokenizers import Tokenizer

    found = Tokenizer.from_str(text)
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True
    return found


@lru_cache(maxsize=4)
def _of(text: str) -> tuple[int | None, bool]:
    """(the id of the unknown token, None where there is none; whether what is unknown is dropped) of a
    tokenizer.json."""
    told = json.loads(text)
    model = told["model"]
    mark = model.get("unk_id")
    if mark is None and (name := model.get("unk_token")) is not None:
        vocabulary = model.get("vocab")
        added = {token["content"]: token["id"] for token in told.get("added_tokens") or []}
        mark = added.get(name, vocabulary.get(name) if isinstance(vocabulary, dict) else None)
    spells_bytes = model.get("byte_fallback") or '"ByteLevel"' in json.dumps(told.get("pre_tokenizer"))
    return mark, mark is None and not spells_bytes
