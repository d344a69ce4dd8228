"""Tokenizers as Hugging Face's folders have them: tokenizer.json and tokenizer_config.json, from a card and back.

A tokenizer of ours has no token in front of a text; a model of ours has read `DOCUMENT` there. So the files of one that
was made here put it there (`add_special_tokens`), those of a tokenizer from elsewhere stay as they came.
"""

import json
from pathlib import Path
from typing import Any

from data.tokenizer import CLOSING, LETTERS, Bytes, Json, from_card

PROBE = "The mixer reads what a span leaves behind: größer, 长 3.14\n\tdef f(x):  return x\n".encode()
NEW_NAME = "<|document|>"  # of a token between documents that a tokenizer.json did not have


def files(card: dict[str, Any], max_length: int | None) -> dict[str, str]:
    """By name, the text of the files of a checkpoint's tokenizer; {} where it is not known what tokens spell.

    max_length: the longest text that the model is for, in tokens. Raises ValueError for a tokenizer that no
    tokenizer.json can say.
    """
    if card.get("name") not in (Bytes.name, Json.name):
        return {}
    tokenizer = from_card(card)
    backend, name, ours = _bytes() if isinstance(tokenizer, Bytes) else _json(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "clean_up_tokenization_spaces": False,
    }
    if ours:
        config["split_special_tokens"] = True  # here, a text that looks like one is spelled out
    if max_length is not None:
        config["model_max_length"] = max_length
    return {"tokenizer.json": backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2)}


def card_of(folder: Path, document: str | None = None) -> dict[str, Any] | None:
    """The card of a folder's tokenizer, None where it has no tokenizer.json. Raises ValueError.

    document: the token between documents; None for what its own configuration calls the end of a text where that is
    one of the usual, else the first of the usual that it has.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        text = path.read_text("utf-8")
        found = Json(text, document=document or _end_of_text(folder))
        if json.loads(text) == json.loads(_bytes()[0].to_str()):  # ours, come back
            return Bytes().card()
        return found.card()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"tokenizer.json: {error}") from None


def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the tokenizers of two cards make other tokens of a text, or open a document with another one."""
    if one == other:
        return False
    try:
        a, b = from_card(one), from_card(other)
        return a.DOCUMENT != b.DOCUMENT or any(
            x.tolist() != y.tolist() for x, y in zip(_probed(a), _probed(b), strict=True)
        )
    except ValueError:  # one of them spells no text
        return True


def _probed(tokenizer: Any) -> Any:
    return tokenizer.encode_batch([PROBE])


def _end_of_text(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["eos_token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    name = found.get("content") if isinstance(found, dict) else found
    return name if name in CLOSING else None


def _bytes() -> tuple[Any, str, bool]:
    """The byte-level tokenizer: a BPE that merges nothing, over the letters that stand for bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE(vocab=dict(LETTERS), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    name = CLOSING[0]
    backend.add_special_tokens([name])
    return _opened(backend, name, Bytes.DOCUMENT), name, True


def _json(tokenizer: Json) -> tuple[Any, str, bool]:
    """A tokenizer.json, the token between documents added where it was new; and whether it has been made here."""
    from tokenizers import Tokenizer as Backend

    backend, name = Backend.from_str(tokenizer.text), tokenizer.document
    if name is None:
        name = NEW_NAME
        backend.add_special_tokens([name])
    if backend.token_to_id(name) != tokenizer.DOCUMENT:
        raise ValueError(f"tokenizer={tokenizer.identity}: no token can be added as {tokenizer.DOCUMENT}")
    if backend.post_processor is not None:
        return backend, name, False
    return _opened(backend, name, tokenizer.DOCUMENT), name, True


def _opened(backend: Any, name: str, token: int) -> Any:
    """With `name` in front of a text, where special tokens are asked for."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, token)]
    )
    return backend
