"""Tokenizers: bytes in, token ids out. A store and a checkpoint keep a tokenizer's card, and find it again by that.

Each has a `DOCUMENT`, the token that opens every document; as a target, it closes the document before it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.stores.indexed import smallest

Ids = NDArray[np.integer]

# What tokenizers call the token between documents, the likeliest first.
CLOSING = ("<|endoftext|>", "<|end_of_text|>", "<|eod|>", "<eod>", "<eos>", "</s>", "[EOS]", "<|begin_of_text|>", "<s>")
DOCUMENT_NAME = "<|document|>"  # of a BPE trained here


class Tokenizer(Protocol):
    """`size`: ids are below it. `identity`: tells it from every other, in a store's card."""

    DOCUMENT: int
    size: int

    @property
    def identity(self) -> str: ...

    def card(self) -> dict[str, Any]:
        """What a checkpoint keeps of its tokenizer: all that `from_card` needs, and what the special ids mean."""

    def spells(self, content: bytes) -> bool:
        """Whether these bytes are what `encode` takes: UTF-8, for most."""

    def encode(self, content: bytes) -> Ids:
        """Token ids of UTF-8 text [T]; no `DOCUMENT` is added."""

    def encode_batch(self, contents: Sequence[bytes]) -> Iterable[Ids]:
        """`encode` of each."""

    def decode(self, ids: ArrayLike) -> bytes:
        """The bytes of integer token ids [T]; specials are dropped."""


class Bytes:
    """The byte-level tokenizer: ids 0..255 are the bytes."""

    name = "bytes"
    DOCUMENT = 256
    size = 257

    @property
    def identity(self) -> str:
        return self.name

    def card(self) -> dict[str, Any]:
        """What a checkpoint keeps of its tokenizer: all that `from_card` needs, and what the special ids mean."""
        return {"name": self.name, "size": self.size, "special": {"document": self.DOCUMENT}}

    def spells(self, content: bytes) -> bool:
        return True

    def encode(self, content: bytes) -> NDArray[np.uint16]:
        """Token ids, uint16 [len(content)]; no `DOCUMENT` is added."""
        return np.frombuffer(content, dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, contents: Sequence[bytes]) -> Iterable[NDArray[np.uint16]]:
        """`encode` of each."""
        return map(self.encode, contents)

    def decode(self, ids: ArrayLike) -> bytes:
        """The bytes of integer token ids [T]; specials are dropped."""
        ids = np.asarray(ids)
        return ids[ids < self.DOCUMENT].astype(np.uint8).tobytes()


class Json:
    """Any tokenizer.json of the `tokenizers` package.

    What looks like a special token in a text is spelled like any other text: no document can end another. text: the
    file's content. document: the token that opens documents; null for the first of `CLOSING` that it has, and where it
    has none, a new id behind its own. Raises ValueError, without a key, for what is no tokenizer.json or has no such
    token.
    """

    name = "json"

    def __init__(self, text: str, *, document: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise ValueError("needs the tokenizers package, which is not installed") from None
        try:
            self._backend = Backend.from_str(text)
        except Exception as error:  # it raises no class of its own
            raise ValueError(f"is no tokenizer.json ({error})") from None
        self.text = text
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        own = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        known = [name for name in CLOSING if self._backend.token_to_id(name) is not None]
        self.document = document or next(iter(known), None)
        found = own if self.document is None else self._backend.token_to_id(self.document)
        if found is None:
            raise ValueError(f"has no token {document}" + (f"; it has {', '.join(known)}" if known else ""))
        self.DOCUMENT: int = found
        self.size = max(own, self.DOCUMENT + 1)
        self.dtype = smallest(self.size)
        added = self._backend.get_added_tokens_decoder()
        self._special = {self.DOCUMENT, *(i for i, token in added.items() if token.special)}
        self._by_letters = '"ByteLevel"' in json.dumps(json.loads(text).get("decoder"))

    def __reduce__(self) -> tuple[Any, ...]:
        return from_card, (self.card(),)

    @property
    def identity(self) -> str:
        """Of the file's content, so that a changed one makes another store."""
        return f"json-{hashlib.sha256(f'{self.document} {self.text}'.encode()).hexdigest()[:16]}"

    def card(self) -> dict[str, Any]:
        """What a checkpoint keeps of its tokenizer: all of it."""
        special = {"document": self.DOCUMENT}
        return {"name": self.name, "size": self.size, "special": special, "document": self.document, "json": self.text}

    def spells(self, content: bytes) -> bool:
        try:
            content.decode()
        except UnicodeDecodeError:
            return False
        return True

    def encode(self, content: bytes) -> Ids:
        """Token ids, uint16 or int32 [T]; no special token is added."""
        return next(iter(self.encode_batch([content])))

    def encode_batch(self, contents: Sequence[bytes]) -> Iterable[Ids]:
        """`encode` of each. One call for many: the package's own batches cost less than as many single ones."""
        texts = [content.decode() for content in contents]
        for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=self.dtype)

    def unknown(self, text: str) -> str | None:
        """The first character of a text that no token spells: `encode` drops it, or makes the unknown token of it."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        mark = getattr(self._backend.model, "unk_token", None)
        unknown = None if mark is None else self._backend.token_to_id(mark)
        spelled = np.zeros(len(text) + 1, dtype=bool)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            spelled[begin:end] |= token != unknown
        return next((c for c, known in zip(text, spelled, strict=False) if not known and not c.isspace()), None)

    def decode(self, ids: ArrayLike) -> bytes:
        """The bytes of integer token ids [T], each token's own, so that half a character is half of its bytes."""
        kept = [int(i) for i in np.asarray(ids).reshape(-1) if int(i) not in self._special]
        return b"".join(map(self._spell, kept))

    def _spell(self, token: int) -> bytes:
        text = self._backend.id_to_token(token) or ""
        if self._by_letters and set(text) <= LETTERS.keys():
            return bytes(LETTERS[letter] for letter in text)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", text):
            return bytes([int(byte[1], 16)])
        return text.replace("\u2581", " ").encode()  # the blank of SentencePiece


class Untrained:
    """A BPE over bytes, of `vocabulary` tokens at most, before it has seen any text: `trained` makes a `Json` of it.

    vocabulary: tokens, the 256 bytes and DOCUMENT among them. Raises ValueError, without a key, for one too small.
    """

    name = "bpe"

    def __init__(self, vocabulary: int) -> None:
        if vocabulary < 257:
            raise ValueError("must be at least 257: the bytes, and the token between documents")
        self.size = vocabulary

    @property
    def identity(self) -> str:
        return f"{self.name}-{self.size}"

    def trained(self, contents: Iterable[bytes]) -> Json:
        """Trained on texts, which are read once; the same for the same texts in the same order."""
        try:
            from tokenizers import Tokenizer as Backend
            from tokenizers import decoders, models, pre_tokenizers, trainers
        except ImportError:
            raise ValueError("data.tokenizer=bpe: needs the tokenizers package, which is not installed") from None
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.size,
            special_tokens=[DOCUMENT_NAME],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((content.decode() for content in contents), trainer)
        return Json(backend.to_str(), document=DOCUMENT_NAME)


class Given:
    """Tokens that somebody else has made, of a corpus in Megatron's format: what they spell is not known.

    size: ids are below it; null for one more than the largest, once that is known. document: the token that stands
    between documents; null for a new one behind the others.
    """

    name = "ids"

    def __init__(self, size: int | None, document: int | None) -> None:
        self.size = size or 0
        self.DOCUMENT = self.size if document is None else document
        self.asked = (size, document)

    @property
    def identity(self) -> str:
        return f"{self.name}-{'-'.join(str(part) for part in self.asked if part is not None)}"

    def fitted(self, largest: int) -> "Given":
        """With the size that the largest id asks for, and the token between documents."""
        size, document = self.asked
        found = Given(max(size or largest + 1, (document or 0) + 1), document)
        if document is None:
            found.size += 1
        return found

    def card(self) -> dict[str, Any]:
        """What a checkpoint keeps of them."""
        return {"name": self.name, "size": self.size, "special": {"document": self.DOCUMENT}}

    def spells(self, content: bytes) -> bool:
        return True

    def encode(self, content: bytes) -> Ids:
        """Raises ValueError: there is no text to make tokens of."""
        raise ValueError("tokenizer=ids: what the tokens spell is not known")

    def encode_batch(self, contents: Sequence[bytes]) -> Iterable[Ids]:
        return map(self.encode, contents)

    def decode(self, ids: ArrayLike) -> bytes:
        """Their numbers, which is all that is known of them."""
        kept = [int(i) for i in np.asarray(ids).reshape(-1) if int(i) != self.DOCUMENT]
        return "".join(f"{i} " for i in kept).encode()


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


TOKENIZERS: dict[str, type] = {Bytes.name: Bytes, Json.name: Json, Given.name: Given}


def from_file(path: str | Path, document: str | None = None) -> Json:
    """The tokenizer of a tokenizer.json, or of a folder that holds one, as a store does. Raises ValueError."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        raise ValueError("must be bytes, bpe, or a tokenizer.json: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    try:
        card = json.loads(text)
        if card["name"] == Json.name:
            return Json(card["json"], document=document or card["document"])
    except (ValueError, KeyError, TypeError):
        pass  # no store's
    return Json(text, document=document)


def encoded(tokenizer: Any, content: bytes) -> Ids:
    """`encode` of what has to be there whole, a prompt. Raises ValueError for what the tokenizer does not spell."""
    if isinstance(tokenizer, Json):
        try:
            missing = tokenizer.unknown(content.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"is no UTF-8 text (byte {error.start})") from None
        if missing is not None:
            raise ValueError(f"the tokenizer has no token for {missing}")
    return tokenizer.encode(content)


def from_card(card: dict[str, Any]) -> Any:
    """The tokenizer that a checkpoint was trained with. Raises ValueError for one that this version does not have."""
    name = card.get("name")
    if name == Symbols.name:
        raise ValueError(f"tokenizer={name}: the symbols of a generated task spell no text")
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer={name}: not in this version, which has {', '.join(TOKENIZERS)}")
    try:
        if name == Json.name:
            found: Any = Json(card["json"], document=card["document"])
        elif name == Given.name:
            found = Given(card["size"], card["special"]["document"])
        else:
            found = TOKENIZERS[name]()
    except (KeyError, ValueError) as error:
        raise ValueError(f"tokenizer={name}: its card is not whole ({error})") from None
    if found.card() != card:
        raise ValueError(f"tokenizer={name}: its card says {_short(card)}, this version's {_short(found.card())}")
    return found


def _short(card: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in card.items() if key != "json"}


def _letters() -> dict[str, int]:
    """The printable letter that GPT-2's byte-level vocabularies write for each byte, and back."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = _letters()
