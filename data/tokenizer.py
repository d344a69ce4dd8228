"""Tokenizers: bytes in, token ids out. A store and a checkpoint keep a tokenizer's card, and find it again by that.

Each has `roles`: the tokens that stand before a document, behind it, and in empty places. Our own have one token for
all of that, `DOCUMENT`, which opens every document; as a target, it closes the document before it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.roles import Roles
from data.spelling import Spelling, SpellingWriter
from data.stores.indexed import smallest
from data.tokenizer_backend import deaf, loaded, sound, unknown_of

Ids = NDArray[np.integer]

# What tokenizers call the token between documents, the likeliest first.
CLOSING = ("<|endoftext|>", "<|end_of_text|>", "<|eod|>", "<eod>", "<eos>", "</s>", "[EOS]", "<|begin_of_text|>", "<s>")
DOCUMENT_NAME = "<|document|>"  # of a BPE trained here


class Tokenizer(Protocol):
    """`size`: ids are below it. `identity`: tells it from every other, in a store's card."""

    roles: Roles
    size: int

    @property
    def identity(self) -> str: ...

    def card(self) -> dict[str, Any]:
        """The card that a checkpoint saves: all that `from_card` needs, and the meaning of the special ids."""

    def spells(self, content: bytes) -> bool:
        """True for bytes that `encode` takes: UTF-8, for most."""

    def encode(self, content: bytes) -> Ids:
        """Token ids of UTF-8 text [T]; no token of `roles` is added."""

    def encode_batch(self, contents: Sequence[bytes]) -> Iterable[Ids]:
        """`encode` of each."""

    def decode(self, ids: ArrayLike) -> bytes:
        """The bytes of integer token ids [T]; specials are dropped."""


class Bytes:
    """The byte-level tokenizer: ids 0..255 are the bytes."""

    name = "bytes"
    DOCUMENT = 256
    roles = Roles.of(DOCUMENT)
    size = 257

    @property
    def identity(self) -> str:
        return self.name

    def card(self) -> dict[str, Any]:
        """The card that a checkpoint saves: all that `from_card` needs, and the meaning of the special ids."""
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

    Text that looks like a special token is spelled like any other text: no document can end another. text: the file's
    content. document: the token that opens documents; null for the first of `CLOSING` that it has, and where it has
    none, a new id behind its own. roles: of a tokenizer from elsewhere, the tokens that stand before and behind a
    document, as its folder has them (`data.hf_tokenizer`), in the place of one that does both. files: the other
    files of that folder, by name their text. ids: the special ids of its config.json, None where it has none. Raises
    ValueError, without a key, for what is no tokenizer.json or has no such token.
    """

    name = "json"

    def __init__(
        self,
        text: str,
        *,
        document: str | None = None,
        roles: Roles | None = None,
        files: dict[str, str] | None = None,
        ids: dict[str, Any] | None = None,
    ) -> None:
        self._backend = loaded(text)
        self.text, self.files, self.ids, self.of_folder = text, files or {}, ids, roles is not None
        own = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.document, self.DOCUMENT = document, None if roles is None else roles.end
        if roles is None:
            known = [name for name in CLOSING if self._backend.token_to_id(name) is not None]
            self.document = document or next(iter(known), None)
            document_id = own if self.document is None else self._backend.token_to_id(self.document)
            if document_id is None:
                raise ValueError(f"has no token {document}" + (f"; it has {', '.join(known)}" if known else ""))
            self.DOCUMENT = document_id
            roles = Roles.of(document_id)
        self.roles = roles
        self.size = max([own - 1, *roles.marks]) + 1
        self.dtype = smallest(self.size)
        added = self._backend.get_added_tokens_decoder()
        self.added = frozenset(added)
        special = {i for i, token in added.items() if token.special or i in roles.stop} | roles.marks
        self._spelling = Spelling(self._backend, text, frozenset(special))
        self._encoder = deaf(text, self._backend, special)
        unknown = unknown_of(text, self._backend)
        self.unknown_id = roles.unknown if unknown is None else unknown

    def __reduce__(self) -> tuple[Any, ...]:
        return from_card, (self.card(),)

    @property
    def identity(self) -> str:
        """A digest of all its parts, so that a changed file makes another store."""
        if self.of_folder:
            return f"json-{hashlib.sha256(json.dumps(self.card(), sort_keys=True).encode()).hexdigest()[:16]}"
        return f"json-{hashlib.sha256(f'{self.document} {self.text}'.encode()).hexdigest()[:16]}"

    def card(self) -> dict[str, Any]:
        """The card that a checkpoint saves: all of the tokenizer."""
        head = {"name": self.name, "size": self.size}
        if not self.of_folder:
            return {**head, "special": {"document": self.DOCUMENT}, "document": self.document, "json": self.text}
        card = {**head, "special": self.roles.card(), "json": self.text, "files": self.files}
        return card if self.ids is None else {**card, "ids": self.ids}

    def spells(self, content: bytes) -> bool:
        try:
            content.decode()
        except UnicodeDecodeError:
            return False
        return True

    def encode(self, content: bytes) -> Ids:
        """Token ids, uint16 or int32 [T]; no special token is added. Raises ValueError where the backend gives up."""
        return next(iter(self.encode_batch([content])))

    def encode_batch(self, contents: Sequence[bytes]) -> Iterable[Ids]:
        """`encode` of each. One call for many: the package's own batches cost less than as many single ones."""
        texts = [content.decode() for content in contents]
        with sound():
            encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        for encoding in encodings:
            yield np.array(encoding.ids, dtype=self.dtype)

    def unknown(self, text: str) -> str | None:
        """The first character of a text that no token spells: `encode` drops it, or makes the unknown token of it."""
        with sound():
            encoding = self._encoder.encode(text, add_special_tokens=False)
        spelled = np.zeros(len(text) + 1, dtype=bool)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            spelled[begin:end] |= token != self.unknown_id
        return next((c for c, known in zip(text, spelled, strict=False) if not known and not c.isspace()), None)

    def decode(self, ids: ArrayLike) -> bytes:
        """The bytes of integer token ids [T] of a text from its begin; half a character is half of its bytes.

        A blank that the tokenizer puts in front of every text is none of its bytes.
        """
        text = self._spelling([int(i) for i in np.asarray(ids).reshape(-1)])
        return text[1:] if text[:1] == b" " and self._leads else text

    def writer(self, before: Sequence[int] = ()) -> SpellingWriter:
        """For the tokens that follow those of a text."""
        return self._spelling.writer(before)

    @cached_property
    def _leads(self) -> bool:
        """True where `encode` puts a blank in front of a text."""
        tokens = (token.lstrip("\u2581\u0120") for token in self._backend.get_vocab())
        for text in ("a", "the", "0", *(token for token, _ in zip(tokens, range(64), strict=False))):
            if text and text[0].isalnum() and self.unknown(text) is None:
                return self._spelling(self.encode(text.encode()).tolist()).startswith(b" ")
        return False


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
        self.roles = Roles.of(self.DOCUMENT)
        self.asked = (size, document)

    @property
    def identity(self) -> str:
        return f"{self.name}-{'-'.join(str(part) for part in self.asked if part is not None)}"

    def fitted(self, largest: int) -> "Given":
        """With the size that the largest id asks for, and the token between documents."""
        size, document = self.asked
        tokenizer = Given(max(size or largest + 1, (document or 0) + 1), document)
        if document is None:
            tokenizer.size += 1
        return tokenizer

    def card(self) -> dict[str, Any]:
        """The card that a checkpoint saves."""
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
        plain = [int(i) for i in np.asarray(ids).reshape(-1) if int(i) != self.DOCUMENT]
        return "".join(f"{i} " for i in plain).encode()


class Symbols:
    """The tokens of a generated task (`data.tasks`): they stand for nothing, and `DOCUMENT` is its mark.

    size: how many there are, the mark included.
    """

    name = "symbols"
    DOCUMENT = 0
    roles = Roles.of(DOCUMENT)

    def __init__(self, size: int) -> None:
        self.size = size

    def card(self) -> dict[str, Any]:
        """The card that a checkpoint saves. `from_card` refuses it: there is no text to make tokens of."""
        return {"name": self.name, "size": self.size, "special": {"document": self.DOCUMENT}}


TOKENIZERS: dict[str, type] = {Bytes.name: Bytes, Json.name: Json, Given.name: Given}


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


def writer(tokenizer: Any, before: Sequence[int]) -> SpellingWriter:
    """For the tokens that follow those of a text."""
    return tokenizer.writer(before) if isinstance(tokenizer, Json) else SpellingWriter(tokenizer.decode)


def from_card(card: dict[str, Any]) -> Any:
    """The tokenizer that a checkpoint was trained with. Raises ValueError for one that this version does not have."""
    name = card.get("name")
    if name == Symbols.name:
        raise ValueError(f"tokenizer={name}: the symbols of a generated task spell no text")
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise ValueError(f"tokenizer={str(name)[:80]}: not in this version, which has {', '.join(TOKENIZERS)}")
    try:
        if name == Json.name and "document" in card:
            tokenizer: Any = Json(card["json"], document=card["document"])
        elif name == Json.name:
            roles = Roles.from_card(card["special"])
            tokenizer = Json(card["json"], roles=roles, files=card["files"], ids=card.get("ids"))
        elif name == Given.name:
            tokenizer = Given(card["size"], card["special"]["document"])
        else:
            tokenizer = TOKENIZERS[name]()
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"tokenizer={name}: its card is not whole ({error})") from None
    if tokenizer.card() != card:
        raise ValueError(f"tokenizer={name}: its card says {_short(card)}, this version's {_short(tokenizer.card())}")
    return tokenizer


def _short(card: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in card.items() if key not in ("json", "files")}
