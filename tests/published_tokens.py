"""Small folders with the kinds of tokenizers that published models have: the same models, decoders, templates and
settings, over a few hundred tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["the arguments found in a text, and the words of it", "def f(x):\n    return x", "zwei ü und 語 here", "a  b"]
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ eos_token }}"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _byte_level(specials: list[str], *, pattern: str | None = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = pre_tokenizers.Split(Regex(pattern), "isolated") if pattern else None
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, letters]) if cut else letters
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    backend.add_special_tokens([_special(name) for name in specials])
    return backend


def _opened(backend: Tokenizer, name: str) -> Tokenizer:
    token = backend.token_to_id(name)
    template = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, token)]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return backend


def _sentencepiece(specials: list[str], *, prepend: bool) -> Tokenizer:
    """A BPE over characters that falls back on bytes, as converted from SentencePiece's."""
    learner = Tokenizer(models.BPE(fuse_unk=True, byte_fallback=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*specials, *BYTES], show_progress=False)
    learner.train_from_iterator((f"▁{text}" for text in TEXTS * 20), trainer)
    told = json.loads(learner.to_str())
    told["added_tokens"] = []
    told["model"]["unk_token"] = "<unk>"
    backend = Tokenizer.from_str(json.dumps(told))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    backend.add_special_tokens([_special(name) for name in specials])
    return backend


def _unigram(specials: list[str], *, suffix: str | None = None) -> Tokenizer:
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=specials,
        unk_token="<unk>",
        initial_alphabet=list("</s>unkpad"),
        show_progress=False,
    )
    learner.train_from_iterator(TEXTS * 20, trainer)
    learner.decoder = decoders.Metaspace(prepend_scheme="always")
    if suffix:
        token = learner.token_to_id(suffix)
        learner.post_processor = processors.TemplateProcessing(
            single=f"$A {suffix}", pair=f"$A {suffix} $B {suffix}", special_tokens=[(suffix, token)]
        )
    return learner


def _write(folder: Path, backend: Tokenizer, settings: dict[str, Any], **others: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))
    for name, told in others.items():
        (folder / f"{name}.json").write_text(json.dumps(told, indent=2))


def llama2(folder: Path) -> dict[str, Any]:
    """SentencePiece's BPE with a blank in front, `<s>` by its settings, and a map of special tokens."""
    backend = _sentencepiece(["<unk>", "<s>", "</s>"], prepend=True)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    settings |= {"model_max_length": 10**30, "clean_up_tokenization_spaces": False, "chat_template": CHAT}
    named = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": "<unk>"}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    _write(folder, backend, settings, special_tokens_map=named, generation_config={**ids, "temperature": 0.6})
    return {"begin": (1,), "end": 2, "stop": (2,), "pad": 0} | {"ids": ids}


def llama3(folder: Path) -> dict[str, Any]:
    """A byte-level BPE with a template, and lists of ids that end a text."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eom_id|>", "<|eot_id|>"]
    backend = _opened(_byte_level(names, pattern=LLAMA3), names[0])
    begin, end, pad, eom, eot = map(backend.token_to_id, names)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0], "eos_token": names[4]}
    settings |= {"pad_token": names[2], "model_max_length": 131072, "clean_up_tokenization_spaces": False}
    ids = {"bos_token_id": begin, "eos_token_id": [end, eom, eot]}
    (folder).mkdir(parents=True, exist_ok=True)
    (folder / "chat_template.jinja").write_text(CHAT)
    _write(folder, backend, settings, generation_config={**ids, "do_sample": True, "top_p": 0.9})
    return {"begin": (begin,), "end": eot, "stop": (end, eom, eot), "pad": pad} | {"ids": ids}


def qwen3(folder: Path) -> dict[str, Any]:
    """A byte-level BPE that puts nothing around a text; what ends a text of the model is a list."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = _byte_level(names, pattern=LLAMA3.replace("{1,3}", ""))
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    end, _, im_end = map(backend.token_to_id, names)
    settings = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None}
    settings |= {"eos_token": names[2], "pad_token": names[0], "unk_token": None, "chat_template": CHAT}
    settings |= {"split_special_tokens": False, "model_max_length": 131072, "clean_up_tokenization_spaces": False}
    ids = {"bos_token_id": end, "eos_token_id": im_end}
    _write(folder, backend, settings, generation_config={"eos_token_id": [im_end, end], "pad_token_id": end})
    return {"begin": (), "end": im_end, "stop": (end, im_end), "pad": end} | {"ids": ids}


def gemma(folder: Path) -> dict[str, Any]:
    """SentencePiece's BPE without a blank in front, padding first, and a list that ends a text."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<end_of_turn>"]
    backend = _sentencepiece(names, prepend=False)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings |= {"chat_template": CHAT, "clean_up_tokenization_spaces": False}
    ids = {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0}
    _write(folder, backend, settings, generation_config=ids)
    return {"begin": (2,), "end": 1, "stop": (1, 5), "pad": 0} | {"ids": ids}


def deepseek(folder: Path) -> dict[str, Any]:
    """A byte-level BPE whose special tokens no list has."""
    backend = _opened(_byte_level([*DEEPSEEK, "<｜▁pad▁｜>"], pattern=LLAMA3), DEEPSEEK[0])
    begin, end, pad = map(backend.token_to_id, (*DEEPSEEK, "<｜▁pad▁｜>"))

    def full(name: str) -> dict[str, Any]:
        return {"__type": "AddedToken", "content": name, "lstrip": False, "normalized": True, "rstrip": False}

    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": full(DEEPSEEK[0]), "eos_token": full(DEEPSEEK[1]), "pad_token": full(DEEPSEEK[1])}
    settings |= {"unk_token": None, "legacy": True, "chat_template": CHAT, "clean_up_tokenization_spaces": False}
    ids = {"bos_token_id": begin, "eos_token_id": end}
    _write(folder, backend, settings, generation_config=ids)
    return {"begin": (begin,), "end": end, "stop": (end,), "pad": end} | {"ids": ids}


def unigram(folder: Path) -> dict[str, Any]:
    """SentencePiece's unigram without a token in front, whose words have its special tokens among them."""
    backend = _unigram(["<pad>", "</s>", "<unk>"])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    _write(folder, backend, settings | {"unk_token": "<unk>", "clean_up_tokenization_spaces": False})
    ids = {"eos_token_id": 1, "pad_token_id": 0}
    return {"begin": (), "end": 1, "stop": (1,), "pad": 0} | {"ids": ids}


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    kind.__name__: kind for kind in (llama2, llama3, qwen3, gemma, deepseek, unigram)
}
