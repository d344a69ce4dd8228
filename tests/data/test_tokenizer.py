"""Tokenizers: what they make of text comes back, whatever it is, and a card is enough to have them again."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from data.hf_tokenizer import from_file
from data.tokenizer import CLOSING, Bytes, Given, Json, Untrained, from_card

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["hello there, hello world", "zwei ü", "語 und 🎉", "<|document|> is text here, and </s> too", " \n\t ", "a"]


@pytest.fixture(scope="module")
def trained() -> Json:
    return Untrained(400).trained([text.encode() for text in TEXTS] * 20)


@pytest.mark.parametrize("text", TEXTS)
def test_a_trained_bpe_round_trips(trained: Json, text: str) -> None:
    ids = trained.encode(text.encode())
    assert ids.dtype == np.uint16 and ids.max() < trained.size <= 400
    assert trained.DOCUMENT not in ids
    assert trained.decode(ids) == text.encode()
    assert b"".join(trained.decode([i]) for i in ids) == text.encode()  # as one that generates spells it


def test_any_text_comes_back_from_a_trained_bpe(trained: Json) -> None:
    draw = random.Random(0)
    for _ in range(200):
        points = [draw.choice([draw.randrange(32, 0x300), draw.randrange(0x4E00, 0x9FFF), 0x1F389]) for _ in range(20)]
        content = "".join(map(chr, points)).encode()
        assert trained.decode(trained.encode(content)) == content


def test_a_trained_bpe_is_shorter_than_bytes(trained: Json) -> None:
    assert len(trained.encode(TEXTS[0].encode())) < len(TEXTS[0]) / 3


def test_training_is_a_function_of_the_texts() -> None:
    texts = [text.encode() for text in TEXTS] * 20
    assert Untrained(300).trained(texts).text == Untrained(300).trained(texts).text
    assert Untrained(300).trained(texts).identity != Untrained(300).trained(texts[::2] + [b"another"]).identity


def test_batches_are_single_ones(trained: Json) -> None:
    contents = [text.encode() for text in TEXTS]
    for one, other in zip(trained.encode_batch(contents), map(trained.encode, contents), strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("copy", [lambda t: pickle.loads(pickle.dumps(t)), lambda t: from_card(t.card())])
def test_a_tokenizer_is_had_again(trained: Json, copy) -> None:
    for tokenizer in (trained, Bytes()):
        again = copy(tokenizer)
        assert again.card() == json.loads(json.dumps(tokenizer.card())) and again.identity == tokenizer.identity
        assert again.encode(b"hello").tolist() == tokenizer.encode(b"hello").tolist()


def words(*special: str) -> str:
    """A tokenizer.json of whole words, with some special tokens behind them, that puts `[CLS]` before every text."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "hello": 2, "world": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    backend.add_special_tokens(list(special))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    return backend.to_str()


def test_no_special_token_is_added_and_nothing_cut_or_padded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(words("</s>"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = from_file(path)
        assert tokenizer.encode(b"hello world hello world").tolist() == [2, 3, 2, 3]
    assert (tokenizer.DOCUMENT, tokenizer.size) == (4, 5)


def test_the_tokenizer_of_a_store_or_a_run_is_one(trained: Json, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(trained.card()))
    assert from_file(tmp_path).card() == trained.card() and from_file(tmp_path).identity == trained.identity
    (tmp_path / "tokenizer.json").write_text(json.dumps({**trained.card(), "json": "{}"}))
    with pytest.raises(ValueError):
        from_file(tmp_path)


def test_the_token_between_documents_is_found_named_or_new() -> None:
    assert Json(words()).DOCUMENT == 4 and Json(words()).size == 5  # behind its own four
    assert Json(words(CLOSING[3], CLOSING[0])).DOCUMENT == 5
    assert Json(words("</s>", "<mine>"), document="<mine>").DOCUMENT == 5
    with pytest.raises(ValueError, match=r"has no token <other>; it has </s>"):
        Json(words("</s>"), document="<other>")
    assert Json(words("</s>")).identity != Json(words("</s>"), document="[CLS]").identity


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        from_file(tmp_path / "x.json")
    with pytest.raises(ValueError, match="must be bytes, bpe, or a tokenizer.json"):
        from_file(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="must be at least 257"):
        Untrained(256)


def test_ids_take_their_size_from_what_is_found() -> None:
    found = Given(None, None).fitted(99)
    assert (found.size, found.DOCUMENT) == (101, 100)
    found = Given(None, 7).fitted(99)
    assert (found.size, found.DOCUMENT) == (100, 7)
    assert from_card(found.card()).card() == found.card()
    assert found.decode([1, 7, 2]) == b"1 2 "
    with pytest.raises(ValueError, match="tokenizer=ids"):
        found.encode(b"text")


def test_a_card_of_another_version_is_refused(trained: Json) -> None:
    for card, line in (
        ({"name": "words"}, "not in this version"),
        ({**trained.card(), "size": 5}, "its card says"),
        ({"name": "json", "size": 5}, "its card is not whole"),
    ):
        with pytest.raises(ValueError, match=line) as error:
            from_card(card)
        assert len(str(error.value)) < 400
