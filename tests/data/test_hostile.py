"""Stores, corpora and tokenizers from elsewhere: they run nothing, and what is wrong with one is one line."""

import io
import json
import os
import pickle
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import hf_tokenizer
from data.corpora.corpus import Text
from data.corpora.megatron import Megatron
from data.corpora.records import Jsonl, Parquet
from data.samplers.documents import Documents
from data.stores import checks
from data.stores.indexed import MAGIC, write_index
from data.stores.store import Store, build
from data.tokenizer import Bytes, Json, from_card
from tests.data import store_of, write
from tests.watched import change, inert

CONTENTS = [b"one", b"two and more", b"three", b"4" * 300]


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.ran),)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of(tmp_path_factory.mktemp("made"), CONTENTS).folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def resealed(folder: Path) -> None:
    """With sizes and checksums that are right, whatever the files hold."""
    card = json.loads((folder / "card.json").read_text())
    names = [name for name in card["files"] if name not in (checks.CHECKSUMS, checks.TOKENS)]
    sums = checks.BlockChecksums()
    sums.update((folder / checks.TOKENS).read_bytes())
    checks.write(folder, names, sums)
    card["files"] = {name: (folder / name).stat().st_size for name in card["files"]}
    (folder / "card.json").write_text(json.dumps(card))


def refused(act: Callable[[], Any]) -> str:
    with inert(), pytest.raises(ValueError) as error:
        act()
    line = str(error.value)
    assert line and "\n" not in line and len(line) < 900
    return line


def whole(folder: Path) -> None:
    """All that a run reads of a store."""
    store = Store(folder)
    checks.verify(store)
    for i in range(len(store)):
        store.document(i)


def objects(value: Any) -> bytes:
    """An .npy file of objects, which numpy writes as a pickle."""
    array = np.empty(5, dtype=object)
    array[:] = [value] * 5
    head = {"descr": "|O", "fortran_order": False, "shape": (5,)}
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, head)
    return stream.getvalue() + pickle.dumps(array)


def lying(shape: str, descr: str = "'<i8'", trail: bytes = b"\0" * 40) -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + trail


ARRAYS = ("offsets.npy", "hashes.npy", "sources.npy")


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_is_a_pickle_is_not_run(folder: Path, tmp_path: Path, name: str) -> None:
    ran = tmp_path / "ran"
    content = objects(Planted(ran))
    (tmp_path / "evil.npy").write_bytes(content)
    np.load(tmp_path / "evil.npy", allow_pickle=True)  # so the plant is one
    ran.rmdir()
    archive = tmp_path / "evil.npz"
    np.savez(archive, offsets=np.zeros(3))
    for evil in (content, pickle.dumps(Planted(ran)), archive.read_bytes()):
        (folder / name).write_bytes(evil)
        resealed(folder)
        assert f"{name} is damaged" in refused(lambda: whole(folder))
        assert not ran.exists()


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    "content",
    [
        lying("(1 << 62,)"),
        lying(f"({1 << 60},)"),
        lying("(-1,)"),
        lying("(5, 1)"),
        lying("('a',)"),
        lying("__import__('os').mkdir('ran')"),
        lying("(5,)", descr="'<M8[s]'"),
        lying("(5,)", descr="[('a', '|O')]"),
        lying("(" * 2000),
        b"\x93NUMPY\x09\x00",
        b"",
    ],
)
def test_an_array_whose_header_lies(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    resealed(folder)
    assert name in refused(lambda: whole(folder))


SUMS: list[Any] = [[], None, {"part_bytes": 1.5, "files": {"tokens.bin": []}}, {"part_bytes": True, "files": []}]
SUMS += [{"part_bytes": 1 << 26, "files": {"tokens.bin": value}} for value in (None, 5, "x", {}, [None], [-1])]
SUMS += [{"part_bytes": 1 << 26, "files": {"tokens.bin": [1], name: [1]}} for name in ("..", "", "/etc/passwd", "a\0")]
SUMS += [{"part_bytes": 1 << 26, "files": {"tokens.bin": [1], "pipe": [0]}}]


@pytest.mark.parametrize("told", SUMS)
def test_checksums_that_say_what_cannot_be(folder: Path, told: Any) -> None:
    os.mkfifo(folder / "pipe")
    (folder / checks.CHECKSUMS).write_text(json.dumps(told))
    card = json.loads((folder / "card.json").read_text())
    card["files"].pop(checks.CHECKSUMS, None)
    (folder / "card.json").write_text(json.dumps(card))
    refused(lambda: whole(folder))


@pytest.mark.parametrize("name", ["card.json", "tokenizer.json", checks.CHECKSUMS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nowhere", "deep", "digits", "not UTF-8"])
def test_a_stores_json_that_is_none(folder: Path, name: str, kind: str) -> None:
    texts = {"deep": b"[" * 100_000, "digits": b'{"version": ' + b"9" * 10_000 + b"}", "not UTF-8": b'{"a": "\xff"}'}
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    elif kind in texts:
        (folder / name).write_bytes(texts[kind])
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else folder / "none")
    refused(lambda: whole(folder))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["..", "/etc"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_of_any_key_of_a_stores_json_is_read_or_refused(made, tmp_path_factory, data) -> None:
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("fuzz") / "store"))
    name = data.draw(st.sampled_from(["card.json", "tokenizer.json", checks.CHECKSUMS]))
    told = json.loads((folder / name).read_text())
    change(data, told, VALUES)
    (folder / name).write_text(json.dumps(told), errors="replace")
    if name == "tokenizer.json":
        resealed(folder)
    with inert():
        try:
            whole(folder)
        except ValueError as error:
            assert "\n" not in str(error)


def test_an_index_beside_a_store_reads_nothing_else_and_is_made_again(folder: Path, tmp_path: Path) -> None:
    store = Store(folder)
    expected = Documents(store, side="train", heldout=0.0).ids.tolist()
    (place,) = (tmp_path / "store.index").glob("[0-9a-f]*")
    right = (place / "index.json").read_text()
    (tmp_path / "secret.bin").write_bytes(b"\0" * 8)
    told = json.loads(right)
    lies: list[Any] = [[], {**told, "facts": 5}, {**told, "counts": []}, {**told, "counts": {"../../secret": 1}}]
    lies += [{**told, "counts": {"ids": value}} for value in ("5", None, -1, 1 << 70, [1])]
    for lie in (*map(json.dumps, lies), "[" * 100_000):
        (place / "index.json").write_text(lie)
        assert Documents(store, side="train", heldout=0.0).ids.tolist() == expected
        assert (place / "index.json").read_text() == right, lie[:80]
    for kind in ("pipe", "device"):
        for name in ("ids.bin", "index.json"):
            (place / name).unlink()
            os.mkfifo(place / name) if kind == "pipe" else (place / name).symlink_to("/dev/zero")
            assert Documents(store, side="train", heldout=0.0).ids.tolist() == expected
            assert (place / name).is_file() and not (place / name).is_symlink()


@pytest.mark.parametrize("harm", ["pickle", "archive", "list", "text", "links"])
def test_a_preparation_that_goes_on_runs_nothing_of_what_it_finds(tmp_path: Path, harm: str) -> None:
    corpus = Text(path=str(tmp_path / "texts"))
    right = store_of(tmp_path, CONTENTS)
    (tmp_path / "store").rename(tmp_path / "right")
    ran = tmp_path / "ran"

    def stopped(job: Any, parts: Any) -> Any:
        for number, part in parts:
            job(number, part)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(corpus, Bytes(), tmp_path / "store", runner=stopped)
    parts = tmp_path / ".store.partial" / "parts"
    facts, table = parts / "000000.json", parts / "000000.npy"
    if harm == "pickle":
        table.write_bytes(objects(Planted(ran)))
    elif harm == "archive":
        np.savez(parts / "evil.npz", a=np.zeros(3))
        (parts / "evil.npz").replace(table)
    elif harm == "list":
        facts.write_text('{"bytes": [], "names": 5, "skipped": {}, "largest": 1}')
    elif harm == "text":
        facts.write_text('"' + "[" * 100_000 + '"')
    else:
        table.unlink()
        os.mkfifo(table)
        (tmp_path / "victim").write_text("mine")
        for link in (parts / "000000.bin", parts.parent / "offsets.npy", parts.parent / "tokens.bin"):
            link.unlink(missing_ok=True)
            link.symlink_to(tmp_path / "victim")
    again = build(corpus, Bytes(), tmp_path / "store")
    assert again.fingerprint == right.card["fingerprint"] and not ran.exists()
    if harm == "links":
        assert (tmp_path / "victim").read_text() == "mine"


LIES = {
    "no magic": pickle.dumps({"a": 1}) * 10,
    "sequences without end": struct.pack("<9sQBQQ", MAGIC, 1, 4, 1 << 63, 1),
    "documents without end": struct.pack("<9sQBQQ", MAGIC, 1, 4, 0, (1 << 64) - 1),
    "an odd type": struct.pack("<9sQBQQ", MAGIC, 1, 6, 0, 1) + b"\0" * 8,
    "a version": struct.pack("<9sQBQQ", MAGIC, 9, 4, 0, 1) + b"\0" * 8,
    "no documents": struct.pack("<9sQBQQ", MAGIC, 1, 4, 0, 0),
    "a sequence before the file": struct.pack("<9sQBQQ", MAGIC, 1, 4, 1, 2) + struct.pack("<iqqq", 4, -16, 0, 1),
    "a length below zero": struct.pack("<9sQBQQ", MAGIC, 1, 4, 2, 2) + struct.pack("<iiqqqq", 8, -4, 0, 32, 0, 2),
    "a document beyond": struct.pack("<9sQBQQ", MAGIC, 1, 4, 1, 2) + struct.pack("<iqqq", 4, 0, 0, 99),
    "a document before": struct.pack("<9sQBQQ", MAGIC, 1, 4, 1, 2) + struct.pack("<iqqq", 4, 0, -7, 1),
    "nothing": b"",
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_of_megatrons_that_lies(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.bin").write_bytes(np.arange(4, dtype="<i4").tobytes())
    write_index(tmp_path / "x.idx", np.array([0, 4]), "<i4")
    corpus = Megatron(path=str(tmp_path / "x"))
    corpus.check()
    assert len(list(corpus)) == 1  # as it should be
    (tmp_path / "x.idx").write_bytes(LIES[name])

    def read() -> None:
        corpus = Megatron(path=str(tmp_path / "x"))
        corpus.check()
        list(corpus)

    assert refused(read).startswith(f"data.path={tmp_path / 'x'}")


JUNK = [pickle.dumps(Planted(Path("ran"))), b"PAR1" + b"\xff" * 40 + b"PAR1", b"[" * 100_000, b'{"text": {"a": 1}}']
JUNK += [b'{"text": "' + b"\xff" + b'"}', b"!!python/object/apply:os.mkdir [ran]\n", b"\0" * 100]


@pytest.mark.parametrize("corpus", [Text, Jsonl, Parquet])
@pytest.mark.parametrize("content", JUNK)
def test_a_corpus_of_anything_is_text_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Any, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    suffix = {Text: "txt", Jsonl: "jsonl", Parquet: "parquet"}[corpus]
    (Path("texts") / f"a.{suffix}").write_bytes(content)
    with inert():
        try:
            found = corpus(path="texts")
            found.check()
            for part in found.parts():
                list(found.read(part, Counter()))
        except ValueError as error:
            assert str(error).startswith("data.") and "\n" not in str(error)
    assert not Path("ran").exists()


BACKTRACKS = (r"(a+)+$", r"(a|a)*$", r"((a+)+)+c", r"(?:a|aa)+$")


def bpe(**changes: Any) -> str:
    vocab = {c: i for i, c in enumerate("abcdefgh!")}
    return json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}} | changes)


@pytest.mark.parametrize("pattern", BACKTRACKS)
@pytest.mark.parametrize("where", ["pre_tokenizer", "normalizer"])
def test_an_expression_that_backtracks_without_end_is_bounded(pattern: str, where: str) -> None:
    told: dict[str, Any] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    if where == "normalizer":
        told = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "b"}
    found = Json(bpe(**{where: told}))
    for act in (found.encode, lambda text: found.unknown(text.decode())):
        assert "gave up on a text" in refused(lambda act=act: act(b"a" * 3000 + b"!"))  # type: ignore[misc]


def test_a_corpus_that_a_tokenizer_gives_up_on_is_one_line(tmp_path: Path) -> None:
    told = {"type": "Split", "pattern": {"Regex": BACKTRACKS[0]}, "behavior": "Isolated", "invert": False}
    corpus = Text(path=str(write(tmp_path / "texts", [b"ab", b"a" * 3000 + b"!"])))
    with pytest.raises(ValueError, match=r"^data\.tokenizer: the tokenizer gave up on a text \(.*retry-limit.*\)$"):
        build(corpus, Json(bpe(pre_tokenizer=told)), tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_a_word_that_nothing_spells_is_one_line() -> None:
    told = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}
    assert "gave up on a text" in refused(lambda: Json(json.dumps(told)).encode(b"zz"))


KEYS = {
    "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    "trust_remote_code": True,
    "tokenizer_class": "Evil",
    "chat_template": "{{ cycler.__init__.__globals__.os.mkdir('ran') }}{% for x in range(10**9) %}{% endfor %}",
}


def test_a_folder_that_asks_for_its_code_is_read_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its template of a chat, a program, is handed on as text: nothing here renders one."""
    monkeypatch.chdir(tmp_path)
    folder = Path("source")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(bpe())
    (folder / "tokenizer_config.json").write_text(json.dumps({**KEYS, "eos_token": "!"}))
    (folder / "config.json").write_text(json.dumps({"auto_map": KEYS["auto_map"], "trust_remote_code": True}))
    (folder / "chat_template.jinja").write_text(KEYS["chat_template"])
    for name in ("evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text("import os; os.mkdir('ran')")
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Planted(Path("ran"))))
    with inert():
        found = hf_tokenizer.read(folder)
        again = from_card(json.loads(json.dumps(found.card())))
        assert again.encode(b"abba").tolist() == [0, 1, 1, 0]
        written = hf_tokenizer.files(found.card(), None)
    assert written["chat_template.jinja"] == KEYS["chat_template"]
    assert not Path("ran").exists()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_of_any_key_of_a_tokenizers_folder_is_read_or_refused(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    names = {
        "tokenizer.json": json.loads(bpe()),
        "tokenizer_config.json": {**deepcopy(KEYS), "eos_token": {"content": "!"}},
    }
    names["tokenizer_config.json"] |= {"added_tokens_decoder": {"8": {"content": "!", "special": True}}}
    names["special_tokens_map.json"] = {"eos_token": "!", "pad_token": {"content": "a"}}
    names["generation_config.json"] = {"eos_token_id": [8, 7], "pad_token_id": 0}
    names["config.json"] = {"eos_token_id": 8, "bos_token_id": None, "text_config": {"eos_token_id": 8}}
    name = data.draw(st.sampled_from(sorted(names)))
    change(data, names[name], VALUES)
    for each, told in names.items():
        (folder / each).write_text(json.dumps(told), errors="replace")
    with inert():
        try:
            card = hf_tokenizer.read(folder).card()
            from_card(json.loads(json.dumps(card))).encode(b"abba")
            hf_tokenizer.files(card, 100)
            hf_tokenizer.ids_of(card)
        except ValueError as error:
            assert "\n" not in str(error)
