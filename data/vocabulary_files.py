"""A tokenizer.json made of vocab.json and merges.txt: the byte-level BPE of folders that are older than that file."""

from pathlib import Path
from typing import Any

from data import reading

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = {  # by the class that a folder names, or its model's type, how text is cut
    "gpt2": "gpt2",
    "GPT2Tokenizer": "gpt2",
    "roberta": "roberta",
    "RobertaTokenizer": "roberta",
    "opt": "gpt2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen2",
    "qwen3_next": "qwen2",
    "Qwen2Tokenizer": "qwen2",
}


def built(folder: Path) -> str:
    """The text of a tokenizer.json. Raises ValueError for files that are damaged, or of a tokenizer that cuts text in a
    way that they do not say."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    settings = _object(folder / "tokenizer_config.json")
    named = str(settings.get("tokenizer_class") or "").removesuffix("Fast") or None
    kind = KINDS.get(named or _object(folder / "config.json").get("model_type") or "gpt2")
    if kind is None:
        known = ", ".join(name for name in KINDS if name[0].isupper())
        raise ValueError(f"is missing, and {named or 'the model'} cannot be made of vocab.json: must be one of {known}")
    try:
        vocabulary = reading.json_object(folder / "vocab.json")
        lines = reading.text(folder / "merges.txt", reading.JSON_BYTES).split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))  # type: ignore[arg-type]
    except Exception as error:  # the package raises no class of its own
        raise ValueError(f"cannot be made of vocab.json and merges.txt ({error})") from None
    prefix = bool(settings.get("add_prefix_space", False))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=kind != "qwen2")
    backend.pre_tokenizer = letters
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), letters])
    backend.decoder = decoders.ByteLevel()
    tokens = _added(folder, settings)
    backend.add_tokens([AddedToken(name, special=special, normalized=False) for name, special in tokens.items()])
    if kind == "roberta":
        end, begin = backend.token_to_id("</s>"), backend.token_to_id("<s>")
        if begin is not None and end is not None:
            backend.post_processor = processors.RobertaProcessing(("</s>", end), ("<s>", begin), True, prefix)
    _around(backend, settings)
    return backend.to_str()


def _around(backend: Any, settings: dict[str, Any]) -> None:
    """Puts before a text and behind it what the settings ask for."""
    from tokenizers import processors

    roles = {kind: settings.get(f"{kind}_token") for kind in ("bos", "eos") if settings.get(f"add_{kind}_token")}
    names = {kind: each.get("content") if isinstance(each, dict) else each for kind, each in roles.items()}
    known = {kind: name for kind, name in names.items() if name and backend.token_to_id(name) is not None}
    if known:
        words = (known.get("bos"), "$A", known.get("eos"))
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(word for word in words if word),
            special_tokens=[(name, backend.token_to_id(name)) for name in dict.fromkeys(known.values())],
        )


def _added(folder: Path, settings: dict[str, Any]) -> dict[str, bool]:
    """The tokens that no merge makes, in the order of their ids, and whether each is special."""
    added: dict[int, tuple[str, bool]] = {}
    for name, i in _object(folder / "added_tokens.json").items():
        added[int(i)] = (name, True)
    decoder = settings.get("added_tokens_decoder") or {}
    try:
        added |= {int(i): (str(each["content"]), bool(each.get("special"))) for i, each in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            "tokenizer_config.json: added_tokens_decoder must be an object of tokens by their ids"
        ) from None
    tokens = {name: special for _, (name, special) in sorted(added.items())}
    for key, value in {**_object(folder / "special_tokens_map.json"), **settings}.items():
        token = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(token, str):
            tokens.setdefault(token, True)
    return tokens


def _object(file: Path) -> dict[str, Any]:
    return reading.json_object(file) if file.exists() else {}
