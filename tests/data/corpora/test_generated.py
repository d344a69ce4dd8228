"""Generated documents: the form that evaluation asks in, where their hay is from, and that anybody makes the same."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.corpora import generated
from data.corpora.corpus import Copies, Needles, Stdlib
from data.corpora.generated import AGAIN, Generated
from data.loader import Data
from data.stores import prepare
from data.stores.store import Store, build
from data.tokenizer import Bytes
from train.evaluation import examples

CORPORA = (Needles, Copies)
TOLD = re.compile(rb"\nThe pass key is (\d{5})\. Remember it: (\d{5}) is the pass key\.\n")
ASKED = re.compile(rb"\nWhat is the pass key\? The pass key is (\d{5})\Z")


def documents(kind: type[Generated], count: int, lengths: tuple[int, int] = (256, 4096), seed: int = 0) -> list[bytes]:
    found = kind(documents=count, lengths=list(lengths), seed=seed)
    found.check()
    return [content for _, content in found]


@pytest.fixture(scope="module")
def halves() -> tuple[set[bytes], set[bytes]]:
    """The lines of the standard library's files that no split holds out, and those of all others."""
    safe, held = set(), set()
    for _, content in Stdlib():
        fraction = int.from_bytes(hashlib.sha256(content).digest()[:8], "little") / 2**64
        (safe if fraction >= 0.25 else held).update(content.split(b"\n"))
    return safe, held


def straw(text: bytes) -> Iterator[bytes]:
    """The hay of a needle's document, on both sides of it; the passage of a copy's."""
    if AGAIN.encode() in text:
        yield text.split(AGAIN.encode())[0]
    else:
        told, asked = TOLD.search(text), ASKED.search(text)
        assert told and asked
        yield text[: told.start()] + text[told.end() : asked.start()]


def test_a_needle_is_told_once_and_asked_for_at_the_end() -> None:
    found = documents(Needles, 2000, (256, 4096))
    depths, numbers = [], []
    for text in found:
        ((number, again),) = TOLD.findall(text)
        asked, told = ASKED.search(text), TOLD.search(text)
        assert asked and told and number == again == asked[1]
        assert text.count(b"The pass key is") == 2
        assert 10_000 <= int(number) <= 99_999 and 256 <= len(text) + 1 <= 4096
        depths.append(told.start() / max(asked.start() - len(told[0]), 1))
        numbers.append(int(number))
    assert np.histogram(depths, 4, (0, 1))[0].min() > 420 and min(depths) < 0.01 and max(depths) > 0.99
    assert len(set(numbers)) > 1900


@pytest.mark.parametrize("number", range(0, 60, 7))
def test_evaluation_asks_in_the_same_form(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its example over the same hay, with the same number and depth, is the same document."""
    text = Needles(lengths=[105, 700]).document(number)
    (around,), told = straw(text), TOLD.search(text)
    assert told is not None
    letters = np.frombuffer(around, dtype=np.uint8).astype(np.int64)
    monkeypatch.setattr(examples, "hay", lambda batches, tokens: letters)
    draws = iter([int(told[1]) - 10_000, 0])
    draw: Any = SimpleNamespace(below=lambda limit, count: np.array([next(draws)]))
    depth = told.start() / max(len(around), 1)
    example = examples.NeedleExamples(SimpleNamespace(tokenizer=Bytes()), 700).example(draw, len(text) + 1, depth)
    assert example.tokens[0] == Bytes.DOCUMENT and bytes(example.tokens[1:].astype(np.uint8)) == text


def test_a_copy_is_a_passage_of_whole_lines_said_again(halves: tuple[set[bytes], set[bytes]]) -> None:
    for text in documents(Copies, 600, (60, 2000)):
        passage, again = text.split(AGAIN.encode())
        assert again in (passage, passage + b"\n") and 60 <= len(text) + 1 <= 2000 and len(passage) >= 16
        first = passage.split(b"\n")[0] if b"\n" in passage else b""
        assert first in halves[0]


@pytest.mark.parametrize("kind", CORPORA)
def test_lengths_are_spread_over_the_logarithm(kind: type[Generated]) -> None:
    lengths = [len(text) + 1 for text in documents(kind, 3000, (128, 8192))]
    assert np.histogram(np.log2(lengths), 6, (7, 13.001))[0].min() > 400
    assert min(lengths) < 132 and max(lengths) > 8000
    assert {len(text) for text in documents(kind, 20, (200, 200))} == {199}
    assert {len(text) for text in documents(kind, 400, (200, 202))} == {199, 200, 201}


@pytest.mark.parametrize("kind", CORPORA)
def test_hay_is_never_of_a_file_that_a_split_may_hold_out(
    kind: type[Generated], halves: tuple[set[bytes], set[bytes]]
) -> None:
    safe, held = halves
    lines = {line for text in documents(kind, 1200) for part in straw(text) for line in part.split(b"\n")[1:-1]}
    assert len(lines) > 10_000
    assert lines <= safe and len(held - safe) > 100_000


def test_training_numbers_come_from_other_draws_than_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same range, no shared sequence: neither hay nor seed of one is the other's."""
    ours = [TOLD.findall(text)[0][0] for text in documents(Needles, 300)]
    letters = np.zeros(4096, np.int64)
    monkeypatch.setattr(examples, "hay", lambda batches, tokens: letters)
    needles = examples.NeedleExamples(SimpleNamespace(tokenizer=Bytes()), 4096)
    for length in (256, 4096):
        draws = [examples.Draw(examples.SEED, examples.NEEDLE, length, n) for n in range(300)]
        told = [bytes(needles.example(d, length, 0.5).tokens[1:].astype(np.uint8)) for d in draws]
        same = [ours[n] == TOLD.findall(text)[0][0] for n, text in enumerate(told)]
        assert sum(same) < 4


@pytest.mark.parametrize("kind", CORPORA)
def test_a_document_is_a_function_of_seed_and_number(kind: type[Generated]) -> None:
    few, many = documents(kind, 50), documents(kind, 120)
    assert many[:50] == few and len(set(many)) == 120
    assert kind().document(37) == few[37]
    assert not set(many) & set(documents(kind, 120, seed=1))
    assert documents(Copies, 5)[0][:40] != documents(Needles, 5)[0][:40]


@pytest.mark.parametrize("kind", CORPORA)
def test_identity_follows_every_parameter(kind: type[Generated], monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [kind(), kind(documents=9), kind(lengths=[256, 4097]), kind(lengths=[257, 4096]), kind(seed=1)]
    assert kind().identity() == kind(documents=10_000, lengths=[256, 4096], seed=0).identity()
    known = [str(corpus.identity()) for corpus in changed]
    monkeypatch.setattr(Stdlib, "version", lambda self: {"python": "another"})
    assert len({*known, str(kind().identity())}) == 6
    assert Needles().identity() != Copies().identity()


@pytest.mark.parametrize("kind", CORPORA)
def test_a_store_is_the_same_at_any_number_of_processes(
    kind: type[Generated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "PART_BYTES", 20_000)
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    corpus = kind(documents=100)
    parts = list(corpus.parts())
    assert len(parts) >= 4 and [n for part in parts for n in range(*part.what)] == list(range(100))
    assert 0.8 < sum(part.size for part in parts) / sum(len(text) for _, text in corpus) < 1.25
    one, two = (build(corpus, Bytes(), tmp_path / f"{n}", workers=n) for n in (1, 2))
    for name in ("tokens.bin", "hashes.npy", "offsets.npy", "card.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert [bytes(two.document(n)[1:].astype(np.uint8)) for n in range(100)] == [text for _, text in corpus]
    assert two.card["skipped"] == {}


@pytest.mark.parametrize("kind", CORPORA)
def test_no_document_is_on_both_sides_of_the_split(kind: type[Generated], tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"max_length": 256, "heldout": 0.2, "heldout_tokens": 512, "store": str(tmp_path / "s")}
    batches = Data(corpus=kind.name, documents=400, lengths=[128, 256], **chosen).open(1024)
    (source,), store = batches.sources, Store(tmp_path / "s")
    ((train, _),), held = source.documents("train", 0.2), batches.heldout_documents[0]
    sides = [{store.document(int(n)).tobytes() for n in side.ids} for side in (train, held)]
    assert not sides[0] & sides[1] and len(train.ids) + len(held.ids) == 400 and 50 < len(held.ids) < 110


def test_every_cut_is_text_to_any_tokenizer() -> None:
    assert all(text.isascii() and b"\0" not in text for kind in CORPORA for text in documents(kind, 400))


def test_hay_begins_again_for_a_document_that_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "hay", lambda root: b"line one\nline two\n")
    text = Needles(lengths=[400, 400]).document(1)
    assert len(text) == 399 and b"line two\nline one" in next(straw(text))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lengths": [512, 256]}, "data.lengths=[512, 256]: must be in order; nearest [256, 512]"),
        (
            {"lengths": [104, 256]},
            "data.lengths=[104, 256]: must begin with at least 105, the room that corpus needles",
        ),
        ({"lengths": [256]}, "data.lengths=[256]: must be two whole numbers, [least, most]"),
        ({"lengths": [256.0, 512]}, "data.lengths=[256.0, 512]: must be two whole numbers"),
        ({"lengths": 256}, "data.lengths=256: must be two whole numbers"),
        ({"lengths": [True, 512]}, "data.lengths=[True, 512]: must be two whole numbers"),
        ({"documents": 0}, "data.documents=0: must be a whole number from 1"),
        ({"documents": 1.5}, "data.documents=1.5: must be a whole number from 1"),
        ({"seed": -1}, "data.seed=-1: must be a whole number from 0"),
        ({"path": "x"}, "data.path=x: corpus needles takes no path: it is generated"),
        ({"heldout": 0.26}, "data.heldout=0.26: must be at most 0.25 for corpus needles"),
        ({"field": "body"}, "data.field=body: corpus needles takes none"),
        ({"corpus": "copies", "lengths": [59, 90]}, "data.lengths=[59, 90]: must begin with at least 60"),
        ({"corpus": "stdlib", "documents": 5}, "data.documents=5: corpus stdlib takes none"),
        ({"corpus": "text", "path": ".", "lengths": [256, 512]}, "data.lengths=[256, 512]: corpus text takes none"),
        ({"corpus": "headers", "seed": 1}, "data.seed=1: corpus headers takes none"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:
        Data(**{"corpus": "needles"} | changes).check()
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_python_without_its_source_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stdlib, "walk", lambda self: iter(()))
    with pytest.raises(ValueError, match=r"^data\.corpus=copies: needs the standard library's source"):
        Copies().check()


def test_a_split_may_hold_out_a_quarter() -> None:
    Data(corpus="needles", heldout=0.25).check()
