"""Tokenizers as Hugging Face's folders have them: tokenizer.json and the files beside it, to a card and back.

A tokenizer from elsewhere puts in front of a document, and of a prompt, what its folder says, and behind a document
the folder's end of text; its files are written back as they came. One of ours has no token in front of a text; a model
of ours has read `DOCUMENT` there. So the files of one that was made here put it there (`add_special_tokens`).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import reading
from data.roles import Roles
from data.spelling import LETTERS, parsed
from data.tokenizer import CLOSING, DOCUMENT_NAME, Bytes, Json, from_card
from data.tokenizer_backend import loaded, sound, unknown_of

PROBE = "The mixer reads what a span leaves behind: größer, 长 3.14\n\tdef f(x):  return x\n".encode()
BESIDE = (  # tokenizer.json: what is kept as it came
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
BYTES_FILE = 1 << 16  # the tokenizer.json of bytes is smaller
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json
ENDS = CLOSING[: CLOSING.index("<|begin_of_text|>")]  # those that are no begin


def files(card: dict[str, Any], max_length: int | None) -> dict[str, str]:
    """Texts of the files of a checkpoint's tokenizer, by name; {} where the bytes of tokens are not known.

    max_length: the longest text that the model is for, in tokens. Raises ValueError for a tokenizer that no
    tokenizer.json can say.
    """
    if card.get("name") not in (Bytes.name, Json.name):
        return {}
    tokenizer = from_card(card)
    if "files" in card:
        return _as_they_came(tokenizer, max_length)
    backend, name = _bytes() if isinstance(tokenizer, Bytes) else _json(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, Bytes) or tokenizer.document == DOCUMENT_NAME:
        config["split_special_tokens"] = True  # here, a text that looks like one is spelled out
    if max_length is not None:
        config["model_max_length"] = max_length
    return {"tokenizer.json": backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2)}


def ids_of(card: dict[str, Any]) -> dict[str, Any]:
    """The special ids that config.json has of a checkpoint's tokenizer: those that came with it, else its own.

    Where nothing that came says what ends a text, a class of configurations would: so the roles' do."""
    roles = Roles.from_card(card["special"]) if card.get("special") else Roles()
    stop = list(roles.stop)
    end = {"eos_token_id": stop if len(stop) > 1 else roles.end}
    if "ids" in card:
        named = "eos_token_id" in json.loads(card["files"].get("generation_config.json", "{}"))
        return card["ids"] if named or roles.end is None else {**end, **card["ids"]}
    return {"bos_token_id": (roles.begin or (None,))[0], **end, "pad_token_id": roles.pad}


def card_of(folder: Path, document: str | None = None) -> dict[str, Any] | None:
    """The card of a folder's tokenizer, None where it has none that is read. Raises ValueError.

    document: the token behind a document; None for the one that the folder ends texts with.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "merges.txt").is_file():
        return None
    try:
        return read(folder, document).card()
    except ValueError as error:
        named_already = str(error).split(":")[0].endswith(".json")
        raise ValueError(str(error) if named_already else f"tokenizer.json: {error}") from None


def from_file(path: str | Path, document: str | None = None) -> Any:
    """The tokenizer of a tokenizer.json, or of a folder: a store's, a run's, or one of Hugging Face's. Raises
    ValueError."""
    file = Path(path).expanduser()
    card = file / "tokenizer.json" if file.is_dir() else file
    try:
        loaded = reading.json_object(card)
        if loaded.get("name") == Json.name:
            return named(from_card(loaded), document)
    except ValueError:
        pass  # no store's
    return read(file, document)


def read(path: Path, document: str | None = None) -> Json | Bytes:
    """The tokenizer of a folder of Hugging Face's, or of a tokenizer.json, with the files beside it.

    document: the token behind a document, None for the one that the folder ends texts with. Where nothing says what
    that is, a tokenizer that no model was trained with gets one token for everything. Raises ValueError, without a key.
    """
    folder = path if path.is_dir() else path.parent
    text = _tokenizer_json(path)
    backend = loaded(text)
    if len(text) < BYTES_FILE and parsed(text) == json.loads(_bytes()[0].to_str()):  # ours, come back
        return Bytes()
    beside = {}
    if path.is_dir() or path.name == "tokenizer.json":
        beside = {name: texts for name in (*BESIDE, "config.json") if (texts := _text(folder / name)) is not None}
    objects = {name: _object(name, texts) for name, texts in beside.items() if name.endswith("config.json")}
    roles = _roles(text, backend, beside, objects)
    config = objects.get("config.json")
    if document is None and not roles.marks and config is None:
        return Json(text)
    ids = None if config is None else {key: config[key] for key in IDS if key in config}
    files = {name: beside[name] for name in BESIDE if name in beside}
    return named(_stopping(Json(text, roles=roles, files=files, ids=ids)), document)


def named(tokenizer: Any, document: str | None) -> Any:
    """A tokenizer, with another token behind its documents where that is named. Raises ValueError where it has none of
    that name."""
    if document is None or not isinstance(tokenizer, Json):
        return tokenizer
    if not tokenizer.of_folder:
        return Json(tokenizer.text, document=document)
    backend = loaded(tokenizer.text)
    end = backend.token_to_id(document)
    if end is None:
        known = [name for name in CLOSING if backend.token_to_id(name) is not None]
        raise ValueError(f"has no token {document}" + (f"; it has {', '.join(known)}" if known else ""))
    stop = tuple(sorted({*tokenizer.roles.stop, end}))
    roles = replace(tokenizer.roles, end=end, stop=stop)
    return _stopping(Json(tokenizer.text, roles=roles, files=tokenizer.files, ids=tokenizer.ids), end)


def _stopping(tokenizer: Json, end: int | None = None) -> Json:
    """With lists of ids that end a text as its roles have them, where those that came lack `end`, or have a word, which
    is no end of a text, and lack that of the roles."""
    every = list(tokenizer.roles.stop)

    def mended(config: dict[str, Any]) -> dict[str, Any]:
        listed = _listed(config.get("eos_token_id"))
        if not listed or tokenizer.roles.end in listed or end is None and tokenizer.added.issuperset(listed):
            return config
        return {**config, "eos_token_id": every if len(every) > 1 else next(iter(every), None)}

    files, name = dict(tokenizer.files), "generation_config.json"
    if name in files and (settings := _object(name, files[name])) != (new := mended(settings)):
        files[name] = json.dumps(new, indent=2)
    ids = None if tokenizer.ids is None else mended(tokenizer.ids)
    if files == tokenizer.files and ids == tokenizer.ids:
        return tokenizer
    return Json(tokenizer.text, roles=tokenizer.roles, files=files, ids=ids)


def _roles(text: str, backend: Any, beside: dict[str, str], tokenizer_settings: dict[str, dict[str, Any]]) -> Roles:
    """Reads a folder's special tokens: those that its own tokenizer would put around a text, and the ids that end
    one that is written, those of its generation_config.json before those of its config.json."""
    settings = tokenizer_settings.get("tokenizer_config.json", {})
    if "special_tokens_map.json" in beside:
        settings = {**_object("special_tokens_map.json", beside["special_tokens_map.json"]), **settings}
    config, generation = tokenizer_settings.get("config.json", {}), tokenizer_settings.get("generation_config.json", {})
    inner = config.get("text_config")
    config = {**(inner if isinstance(inner, dict) else {}), **config}
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    added = _added(settings)

    def of(kind: str) -> list[int]:
        """The ids of a kind of token: the tokenizer's own, else those that the model's configuration has."""
        name = _name(settings.get(f"{kind}_token"))
        own = None if name is None else backend.token_to_id(name)
        own = added.get(name) if own is None else own
        if own is not None:
            return [own]
        listed = _listed(generation.get(f"{kind}_token_id")) or _listed(config.get(f"{kind}_token_id"))
        return [i for i in listed if 0 <= i < size]

    begin, behind = around(backend)
    eos, pad = of("eos"), of("pad")
    special = backend.get_added_tokens_decoder().keys() | set(added.values())
    guessed = [backend.token_to_id(name) for name in ENDS if backend.token_to_id(name) is not None]
    end = next(iter([*behind[-1:], *(i for i in eos if i in special), *guessed, *eos]), None)
    stop = _listed(generation.get("eos_token_id")) or _listed(config.get("eos_token_id"))
    if end not in stop:  # a word is no end of a text: it is what a class of configurations has where nothing is said
        stop = [i for i in stop if i in special]
    every = sorted({*stop, *(() if end is None else (end,))})
    return Roles(begin, end, tuple(every), next(iter(pad), None), unknown_of(text, backend))


def around(backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a backend puts before a text and behind it, where special tokens are asked for."""
    words = (word for word in backend.get_vocab() if word.isalnum())
    for text in ("a", "the", *(word for word, _ in zip(words, range(64), strict=False))):
        with sound():
            inner = backend.encode(text, add_special_tokens=False).ids
            whole = backend.encode(text, add_special_tokens=True)
        if inner:
            lead = next((n for n, special in enumerate(whole.special_tokens_mask) if not special), 0)
            return tuple(whole.ids[:lead]), tuple(whole.ids[lead + len(inner) :])
    return (), ()


def _as_they_came(tokenizer: Json, max_length: int | None) -> dict[str, str]:
    files, name = {"tokenizer.json": tokenizer.text, **tokenizer.files}, "tokenizer_config.json"
    if name not in files:
        backend, roles = loaded(tokenizer.text), tokenizer.roles
        both = {"bos_token": next(iter(roles.begin), None), "eos_token": roles.end}
        words = {key: backend.id_to_token(i) for key, i in both.items() if i is not None}
        words |= {} if max_length is None else {"model_max_length": max_length}
        files[name] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **words}, indent=2)
    config = json.loads(files[name])
    known = config.get("model_max_length")
    if max_length is not None and isinstance(known, int | float) and known < max_length:
        files[name] = json.dumps({**config, "model_max_length": max_length}, indent=2, ensure_ascii=False)
    return files


def _tokenizer_json(path: Path) -> str:
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.exists() and (path / "vocab.json").exists() and (path / "merges.txt").exists():
        from data.vocabulary_files import built

        return built(path)
    if not file.exists():
        raise ValueError("must be bytes, bpe, or a tokenizer.json: there is no such file")
    return reading.text(file, reading.JSON_BYTES).rstrip("\n")


def _text(file: Path) -> str | None:
    if not file.exists():
        return None
    text = reading.text(file, reading.JSON_BYTES)
    return text.rstrip("\n") if file.suffix == ".json" else text


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")
    return value


def _added(settings: dict[str, Any]) -> dict[str | None, int]:
    """The ids of the tokens that a tokenizer_config.json adds, by their text."""
    tokens = settings.get("added_tokens_decoder") or {}
    if not isinstance(tokens, dict) or not all(str(i).isdecimal() for i in tokens):
        raise ValueError("tokenizer_config.json: added_tokens_decoder must be an object whose keys are ids")
    return {_name(token): int(i) for i, token in tokens.items()}


def _name(token: Any) -> str | None:
    """A token's text, as a configuration has it: alone, or with how it is matched."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _listed(ids: Any) -> list[int]:
    """One id, a list of them, or none."""
    return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and not isinstance(i, bool)]


def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """True where the tokenizers of two cards make other tokens of a text, or open a document with another one."""
    if one == other:
        return False
    try:
        a, b = from_card(one), from_card(other)
        return (a.roles.begin, a.roles.end) != (b.roles.begin, b.roles.end) or any(
            x.tolist() != y.tolist() for x, y in zip(_probed(a), _probed(b), strict=True)
        )
    except ValueError:  # one of them spells no text
        return True


def _probed(tokenizer: Any) -> Any:
    return tokenizer.encode_batch([PROBE])


def _bytes() -> tuple[Any, str]:
    """The byte-level tokenizer: a BPE that merges nothing, over the letters that stand for bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE(vocab=dict(LETTERS), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    name = CLOSING[0]
    backend.add_special_tokens([name])
    return _opened(backend, name, Bytes.DOCUMENT), name


def _json(tokenizer: Json) -> tuple[Any, str]:
    """A tokenizer.json, the token between documents added where it was new, and put in front of a text."""
    from tokenizers import Tokenizer as Backend

    backend, name, token = Backend.from_str(tokenizer.text), tokenizer.document, tokenizer.roles.fill
    if name is None:
        name = DOCUMENT_NAME
        backend.add_special_tokens([name])
    if backend.token_to_id(name) != token:
        raise ValueError(f"tokenizer={tokenizer.identity}: no token can be added as {token}")
    return backend if backend.post_processor is not None else _opened(backend, name, token), name


def _opened(backend: Any, name: str, token: int) -> Any:
    """With `name` in front of a text, where special tokens are asked for."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, token)]
    )
    return backend
