"""What stands in front of the texts of the lm-eval harness, and what ends its answers, of published tokenizers."""

from types import SimpleNamespace

import numpy as np
import pytest

from data.pack import NO_TARGET, Packed
from train.evaluation.score import Score
from train.evaluation.texts import packed, spelled

pytest.importorskip("tokenizers")

from data.hf_tokenizer import read  # noqa: E402
from tests.published_tokens import KINDS  # noqa: E402
from train.evaluation.harness import Answers  # noqa: E402


@pytest.fixture(params=["llama2", "llama3", "qwen3", "gemma"])
def asked(request, tmp_path, monkeypatch):
    """(answers, what they have had scored) of a tokenizer, over a model that writes what it is told to."""
    import train.evaluation.harness as harness

    KINDS[request.param](tmp_path)
    scored, told = [], []

    def scorer(examples):
        scored.extend(examples)
        return [Score(np.ones(len(e.tokens)), np.ones(len(e.tokens), dtype=bool)) for e in examples]

    def extend(texts, count, sampling, take):
        scored.append(texts[0])
        for token in told:
            if not take(0, token):
                return

    decoder = SimpleNamespace(read=lambda tokens: tokens, extend=extend)
    monkeypatch.setattr(harness, "Decoder", lambda model: decoder)
    return Answers(None, scorer, read(tmp_path), 64), scored, told


def test_a_text_stands_behind_what_its_tokenizer_puts_there_and_one_alone_behind_something(asked):
    answers, scored, _ = asked
    roles, encode = answers.roles, lambda text: answers.tokenizer.encode(text.encode()).tolist()
    (first, _), (alone, _) = answers.likelihoods([("the words", " of"), ("", "the words")])
    begin, entry = list(roles.begin), list(roles.begin or (roles.end,))
    assert scored[0].tokens.tolist() == [*begin, *encode("the words of")]
    assert scored[1].tokens.tolist() == [*entry, *encode("the words")]
    assert first == -(len(encode("the words of")) - len(encode("the words"))) and alone == -len(encode("the words"))
    text = "the arguments found in a text, and the words of it " * 12
    scored.clear()
    assert len(encode(text)) > 64 and answers.rolling([text]) == [-sum(len(e.tokens) for e in scored)]
    assert all(e.tokens[: len(entry)].tolist() == entry and len(e.tokens) <= 64 for e in scored)
    targets = np.concatenate([e.targets[e.targets != NO_TARGET] for e in scored]).tolist()
    assert targets == encode(text)


def test_an_answer_ends_at_each_id_that_ends_a_text(asked):
    answers, scored, told = asked
    words = answers.tokenizer.encode(b"the words of it").tolist()
    for stop in answers.roles.stop:
        told[:] = [*words[1:], stop, *words]
        assert answers.continuations([("the", {"max_gen_toks": 9})]) == [" words of it"]
        assert scored[-1] == [*answers.roles.begin, *answers.tokenizer.encode(b"the").tolist()]


def test_targets_spell_the_bytes_of_their_text(asked):
    """No blank that a tokenizer puts in front, no mark; of several pieces each its own."""
    tokenizer = asked[0].tokenizer
    pieces, sizes = [], []
    for text in (b"the words", " zwei \u00fc und \u8a9e".encode(), b"a  b"):
        if tokenizer.name == "json" and text.startswith(b" ") and tokenizer.decode(tokenizer.encode(text)) != text:
            text = text[1:]  # a blank that the tokenizer takes for its own
        ids = [*tokenizer.roles.begin, *tokenizer.encode(text).tolist(), tokenizer.roles.end]
        pieces.append(packed(ids))
        sizes.append(len(text) - (0 if tokenizer.roles.begin else len(tokenizer.decode(ids[:1]))))
        assert spelled(tokenizer, pieces[-1]) == sizes[-1]
    fields = (np.concatenate([getattr(p, key) for p in pieces]) for key in ("tokens", "targets", "starts"))
    assert spelled(tokenizer, Packed(*fields)) == sum(sizes)
