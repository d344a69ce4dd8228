"""The bytes that tokens of a tokenizer.json spell, whatever model and decoder it has."""

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_CONTEXT = 8  # tokens before one, that its spelling depends on
_BLANK = "\u2581"  # of SentencePiece
_EXACT = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}  # decoders that spell each token by itself
_SPLITS = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}  # which drop blanks, and leave no mark


class Spelling:
    """Bytes that ids of a backend of the `tokenizers` package spell.

    Of a byte-level vocabulary and of SentencePiece's, each token has bytes of its own, so that half a character is half
    of its bytes. Of all others (WordPiece, BPE with ends of words, whole words) the folder's own decoder says it, for
    several tokens together. silent: the ids that spell nothing.
    """

    def __init__(self, backend: Any, text: str, silent: frozenset[int]) -> None:
        settings = parsed(text)
        self._backend, self.silent = backend, silent
        decoder, model = settings.get("decoder"), settings["model"]
        steps, before = _flat(decoder, "decoders"), _flat(settings.get("pre_tokenizer"), "pretokenizers")
        kinds, splits = {step.get("type") for step in steps}, {step.get("type") for step in before}
        self.by_letters = "ByteLevel" in kinds or (not steps and "ByteLevel" in splits)
        self._added = frozenset(self._backend.get_added_tokens_decoder())
        self._blanks = {} if steps else {_BLANK: " "}
        exact, self.falls_back = kinds <= _EXACT, "ByteFallback" in kinds
        for step in steps:
            if step.get("type") == "Metaspace":
                self._blanks[step["replacement"]] = " "
            if step.get("type") == "Replace":
                exact &= "String" in step["pattern"]
                self._blanks[step["pattern"].get("String", _BLANK)] = step["content"]
        self._decode: Callable[[list[str]], str] | None = None
        if not self.by_letters and not (exact and steps):
            self._decode = self._whole(model, bool(steps), bool(splits & _SPLITS))

    def _whole(self, model: dict[str, Any], decoder: bool, splits: bool) -> Callable[[list[str]], str] | None:
        """Finds the way in which several tokens are spelled together; None where each is spelled by itself."""
        from tokenizers import decoders

        if decoder:
            return self._backend.decoder.decode
        prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        if suffix:
            return decoders.BPEDecoder(suffix=suffix).decode
        if prefix:
            return decoders.WordPiece(prefix=prefix, cleanup=False).decode
        return " ".join if splits or model.get("type") == "WordLevel" else None

    def is_byte(self, token: int) -> bool:
        """True for a token that is a byte, on which text without a token of its own falls back."""
        return _BYTE.fullmatch(self._backend.id_to_token(token) or "") is not None

    def each(self, token: int) -> bytes:
        """A token's own bytes, where it has any."""
        text = self._backend.id_to_token(token) or ""
        if self.by_letters and token in self._added:
            return text.encode()
        if self.by_letters and set(text) <= LETTERS.keys():
            return bytes(LETTERS[letter] for letter in text)
        if byte := _BYTE.fullmatch(text):
            return bytes([int(byte[1], 16)])
        for mark, blank in self._blanks.items():
            text = text.replace(mark, blank)
        return text.encode()

    def __call__(self, ids: Sequence[int]) -> bytes:
        """Spells tokens one after another."""
        audible = [i for i in ids if i not in self.silent]
        if self._decode is None:
            return b"".join(map(self.each, audible))
        return self._decode([self._backend.id_to_token(i) or "" for i in audible]).encode()

    def writer(self, before: Sequence[int]) -> "SpellingWriter":
        """For the tokens that follow those of a text."""
        if self._decode is not None:
            return _Together(self, before)
        return _Runs(self) if self.falls_back else SpellingWriter(self)


class SpellingWriter:
    """Tells of each token that follows a text the bytes that it adds; `close` those that were held back."""

    def __init__(self, spell: Callable[[Sequence[int]], bytes]) -> None:
        self.spell = spell

    def __call__(self, token: int) -> bytes:
        return self.spell([token])

    def close(self) -> bytes:
        return b""


class _Runs(SpellingWriter):
    """The writer for a vocabulary that falls back on bytes: a run of them is text as a whole, or each is a mark of
    damage, as the `tokenizers` package has it."""

    def __init__(self, spell: Spelling) -> None:
        super().__init__(spell)
        self.silent, self.is_byte = spell.silent, spell.is_byte
        self.held = b""

    def __call__(self, token: int) -> bytes:
        if token in self.silent:
            return b""
        if self.is_byte(token):
            self.held += self.spell([token])
            return b""
        return self.close() + self.spell([token])

    def close(self) -> bytes:
        held, self.held = self.held, b""
        try:
            held.decode()
        except UnicodeDecodeError:
            return "\ufffd".encode() * len(held)
        return held


class _Together(SpellingWriter):
    """The writer for tokens whose bytes depend on those before them."""

    def __init__(self, spell: Spelling, before: Sequence[int]) -> None:
        super().__init__(spell)
        self.silent = spell.silent
        self.last = [i for i in before if i not in self.silent][-_CONTEXT:]

    def __call__(self, token: int) -> bytes:
        if token in self.silent:
            return b""
        old = self.spell(self.last)
        self.last = [*self.last, token]
        new = self.spell(self.last)
        self.last = self.last[-_CONTEXT:]
        both = zip(old, new, strict=False)
        same = next((n for n, (a, b) in enumerate(both) if a != b), min(len(old), len(new)))
        return new[same:]


@lru_cache(maxsize=2)
def parsed(text: str) -> dict[str, Any]:
    """Parses a tokenizer.json, to be read and not changed: those of large vocabularies take long to parse."""
    return json.loads(text)


def _flat(step: Any, several: str) -> list[dict[str, Any]]:
    """The steps of a sequence of a tokenizer.json, one by one."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence":
        return [each for part in step.get(several, []) for each in _flat(part, several)]
    return [step]


def _letters() -> dict[str, int]:
    """The printable letter that GPT-2's byte-level vocabularies write for each byte, and back."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = _letters()
