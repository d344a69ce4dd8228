"""Files that a corpus or a store is read from, damaged at random: documents or one line that opens with a key, within
seconds, and nothing half-written.

A few examples of each here; FARSPAN_FUZZ=1000 tries as many.
"""

import bz2
import gzip
import json
import lzma
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.corpora.corpus import Text
from data.corpora.megatron import Megatron
from data.corpora.records import Jsonl, Parquet
from data.stores import card
from data.stores.checks import verify
from data.stores.fetch import fetch
from data.stores.indexed import TokenIndex
from data.stores.prepare import DATA
from data.stores.store import Store, build
from data.tokenizer import Bytes, Given
from tests.data import prose, store_of

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

SECONDS = 10.0  # that any reader may take
TRIED = settings(
    max_examples=int(os.environ.get("FARSPAN_FUZZ", 8)),
    derandomize="FARSPAN_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "draw", lambda *_: None)


LINES = b"".join(json.dumps({"text": f"line {i} ü", "n": i}, ensure_ascii=False).encode() + b"\n" for i in range(40))


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"text": [f"row {i}" for i in range(40)], "n": list(range(40))})
    pq.write_table(table, sink, row_group_size=8, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


WHOLE: dict[str, tuple[Any, bytes]] = {
    "x.txt": (Text, "some text ü".encode() * 20),
    "x.jsonl": (Jsonl, LINES),
    "x.jsonl.gz": (Jsonl, gzip.compress(LINES, mtime=0)),
    "x.jsonl.bz2": (Jsonl, bz2.compress(LINES)),
    "x.jsonl.xz": (Jsonl, lzma.compress(LINES)),
    "x.jsonl.zst": (Jsonl, zstd(LINES)),
    "x.parquet": (Parquet, parquet()),
}

# A change of some bytes: (where, as a fraction; how many go; what comes).
Change = tuple[float, int, bytes]
changes = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 64),
        st.one_of(
            st.binary(max_size=16),
            st.sampled_from(
                [b"\0", b"\xff" * 8, b'{"text": ', b"[" * 2000, b"\n", b"9" * 5000, b"\xef\xbb\xbf", b"null"]
            ),
        ),
    ),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, asked: list[Change]) -> bytes:
    for where, gone, come in asked:
        place = int(where * (len(content) + 1))
        content = content[:place] + come + content[place + gone :]
    return content


def holds(read: Callable[[], Any]) -> Any:
    """What a reader gives, None where it refuses: in one line that opens with a key, and in time."""
    begun = time.monotonic()
    try:
        return read()
    except ValueError as error:
        line = str(error)
        assert line.startswith("data.") and "\n" not in line and len(line) < 1000, line
        return None
    finally:
        assert time.monotonic() - begun < SECONDS


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("name", WHOLE)
@TRIED
@given(asked=changes)
@example(asked=[(0.0, 10**6, b"")])
@example(asked=[(0.5, 10**6, b"")])
@example(asked=[(0.5, 1, b"\x07")])
def test_damaged_files_of_a_corpus(tmp_path: Path, name: str, on_error: str, asked: list[Change]) -> None:
    kind, whole = WHOLE[name]
    folder = tmp_path / "corpus"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(changed(whole, asked))
    keys = {} if kind is Text else {"on_error": on_error}

    def made() -> Store:
        corpus = kind(path=str(folder), **keys)
        corpus.check()
        return build(corpus, Bytes(), tmp_path / "out" / "store")

    store = holds(made)
    if store is None:
        assert not (tmp_path / "out").exists()
    else:
        assert verify(store)[0] > 0 and [p.name for p in (tmp_path / "out").iterdir()] == ["store"]
        shutil.rmtree(tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return store_of(folder, prose(30, 60)).folder


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "store"


def read_all(folder: Path) -> Any:
    store = Store(folder)
    verify(store, 5.0)
    return [store.document(i).tolist() for i in range(len(store))], [store.source(i) for i in range(0, len(store), 9)]


@pytest.mark.parametrize("name", [*DATA, "checksums.json", "card.json"])
@TRIED
@given(asked=changes, sized=st.booleans())
def test_damaged_files_of_a_store(whole: Path, damaged: Path, name: str, asked: list[Change], sized: bool) -> None:
    """sized: the file keeps its size, which is looked at first."""
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    content = (whole / name).read_bytes()
    other = changed(content, asked)
    (damaged / name).write_bytes(other[: len(content)].ljust(len(content), b"\0") if sized else other)
    holds(lambda: read_all(damaged))
    holds(lambda: fetch(str(damaged), damaged.parent / "local"))
    shutil.rmtree(damaged.parent / "local", ignore_errors=True)


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.sampled_from(["", "x", "/dev/zero", "../.."]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


@pytest.mark.parametrize("name", ["card.json", "checksums.json", "tokenizer.json"])
@TRIED
@given(data=st.data())
def test_wrong_types_in_a_stores_json(whole: Path, damaged: Path, name: str, data: st.DataObject) -> None:
    """The sizes in the card are made to fit, so that what is read is what is tried."""
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    told = json.loads((whole / name).read_text())
    if data.draw(st.integers(0, 4)):
        at = told["files"] if name != "tokenizer.json" and data.draw(st.booleans()) else told
        at[data.draw(st.sampled_from(sorted(at)))] = data.draw(json_values)
    else:
        told = data.draw(json_values)
    (damaged / name).write_text(json.dumps(told))
    if name != "card.json":
        facts = json.loads((whole / "card.json").read_text())
        facts["files"][name] = (damaged / name).stat().st_size
        (damaged / "card.json").write_text(json.dumps(facts))
    holds(lambda: read_all(damaged))


@TRIED
@given(asked=changes, bin_=st.booleans())
def test_a_damaged_corpus_of_megatrons(whole: Path, damaged: Path, asked: list[Change], bin_: bool) -> None:
    damaged.mkdir(exist_ok=True)
    for name in ("tokens.bin", "tokens.idx"):
        shutil.copy(whole / name, damaged / name)
    name = "tokens.bin" if bin_ else "tokens.idx"
    content = (whole / name).read_bytes()
    (damaged / name).write_bytes(changed(content, asked)[: len(content)].ljust(len(content), b"\0"))

    def made() -> Store:
        corpus = Megatron(path=str(damaged / "tokens"))
        corpus.check()
        return build(corpus, Given(None, corpus.closing()), damaged.parent / "out" / "store")

    if holds(made) is None:
        assert not (damaged.parent / "out").exists()
    shutil.rmtree(damaged.parent / "out", ignore_errors=True)


@TRIED
@given(content=st.binary(max_size=200))
def test_an_index_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.idx").write_bytes(b"MMIDIDX\0\0" + content)
    try:
        TokenIndex(tmp_path / "x.idx").check()
    except ValueError as error:
        assert "\n" not in str(error)
