"""A tokenizer.json as the `tokenizers` package reads it, with the package's errors as ValueErrors of one line."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data.spelling import parsed


@contextmanager
def sound(problem: str = "the tokenizer gave up on a text") -> Iterator[None]:
    """Turns an error of the `tokenizers` package into a ValueError of one line, `problem` and the reason.

    It has no class of its own for errors, and a panic of its Rust is no `Exception`: an expression of a tokenizer.json
    that backtracks without end ends in one, at the limit of the package's regular expressions.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{problem} ({' '.join(str(error).split())[:200]})") from None


def loaded(text: str) -> Any:
    """A backend of the `tokenizers` package that adds, cuts and pads nothing. Raises ValueError."""
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise ValueError("needs the tokenizers package, which is not installed") from None
    with sound("is no tokenizer.json"):
        backend = Backend.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def deaf(text: str, backend: Any, special: set[int]) -> Any:
    """A backend whose `encode` never makes a special token of text that looks like one.

    `encode_special_tokens` is not enough where the model itself has them as words, or where one is not called special:
    there they get names that no text has.
    """
    names = {i: name for i in special if (name := backend.id_to_token(i)) is not None}
    if (
        parsed(text)["model"].get("type", "BPE") == "BPE"
    ):  # which makes words by merges: most have no way to a special token
        probes = [probe for name in names.values() for probe in (name, f"a{name}b", f" {name} ")]
        with sound():
            ids = {i for each in backend.encode_batch(probes, add_special_tokens=False) for i in each.ids}
        if not special & ids - {unknown_of(text, backend)}:
            return backend
    settings = json.loads(text)
    model = settings["model"]
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    secret = {name: f"\ufdd0{digest}-{i}" for i, name in names.items()}
    for token in settings.get("added_tokens", ()):
        if token["content"] in secret:
            token |= {"content": secret[token["content"]], "special": True}
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, dict):
        model["vocab"] = {secret.get(name, name): i for name, i in vocabulary.items()}
    else:
        model["vocab"] = [[secret.get(name, name), score] for name, score in vocabulary]
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not secret.keys() & {*pair, "".join(pair)}]
    if model.get("unk_token") in secret:
        model["unk_token"] = secret[model["unk_token"]]
    return loaded(json.dumps(settings))


def unknown_of(text: str, backend: Any) -> int | None:
    """The id of what stands for text that no token spells."""
    model = parsed(text)["model"]
    name = model.get("unk_token")
    return model.get("unk_id") if name is None else backend.token_to_id(name)
