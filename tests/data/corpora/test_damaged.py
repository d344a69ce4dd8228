"""Damaged containers, devices, and what lies beside a corpus: one line that names the file, or a count by reason."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import shutil
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.corpora import records
from data.corpora.corpus import Text
from data.corpora.hub import HuggingFace
from data.corpora.megatron import Megatron
from data.corpora.records import Jsonl, Parquet, Records

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

LINES = b"".join(json.dumps({"text": f"{i} {os.urandom(40).hex()}"}).encode() + b"\n" for i in range(400))


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def refusal(corpus: Records, *, check: bool = False) -> str:
    with pytest.raises(ValueError) as error:
        corpus.check()
        if not check:
            list(corpus)
    line = str(error.value)
    assert "\n" not in line and line.startswith("data.") and len(line) < 500
    return line


@pytest.mark.parametrize("how", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson"])
def test_packed_lines_are_read(tmp_path: Path, how: str, suffix: str) -> None:
    (tmp_path / f"a{suffix}.{how}").write_bytes(PACK[how](LINES))
    (tmp_path / f"b{suffix}.{how.upper()}").write_bytes(PACK[how](LINES[:300]) + PACK[how](LINES[300:]))
    found = [content for _, content in Jsonl(path=str(tmp_path))]
    assert found == 2 * [json.loads(line)["text"].encode() for line in LINES.splitlines()]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("how", PACK)
@pytest.mark.parametrize("harm", ["cut", "none", "flipped"])
def test_a_damaged_container_is_one_line_with_its_name(tmp_path: Path, how: str, harm: str, on_error: str) -> None:
    whole = PACK[how](LINES)
    middle = len(whole) // 2 if how != "zst" or harm == "cut" else 2  # pyarrow writes no checksum behind a frame
    damaged = {
        "cut": whole[:middle],
        "none": LINES,
        "flipped": whole[:middle] + bytes([whole[middle] ^ 0x40]) + whole[middle + 1 :],
    }[harm]
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / f"bad.jsonl.{how}").write_bytes(damaged)
    line = refusal(Jsonl(path=str(tmp_path), on_error=on_error))
    assert f"bad.jsonl.{how}" in line


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, compression="snappy", write_page_checksum=True, use_dictionary=False)
    return path


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_damaged_parquet_page_is_one_line_with_its_name(tmp_path: Path, on_error: str) -> None:
    path = table(tmp_path / "bad.parquet", text=[os.urandom(40).hex() for _ in range(500)])
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)
    assert "bad.parquet is damaged" in refusal(Parquet(path=str(tmp_path), on_error=on_error))


def test_a_parquet_file_that_is_cut_short_is_one_line_with_its_name(tmp_path: Path) -> None:
    path = table(tmp_path / "bad.parquet", text=["x"] * 50)
    path.write_bytes(path.read_bytes()[:-9])
    assert "bad.parquet is no Parquet file, or a damaged one" in refusal(Parquet(path=str(tmp_path)))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    both = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(both, tmp_path / "bad.parquet")
    line = refusal(Parquet(path=str(tmp_path)), check=True)
    assert line == "data.field=text: bad.parquet has 2 columns of that name; it has text, text"
    other = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"]), pa.array(["z"])], names=["a", "a", "text"])
    pq.write_table(other, tmp_path / "bad.parquet")
    assert [content for _, content in Parquet(path=str(tmp_path))] == [b"z"]


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000])
def test_a_number_of_too_many_digits_is_no_json(tmp_path: Path, number: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(LINES + f'{{"n": {number}, "text": "x"}}\n'.encode())
    line = refusal(Jsonl(path=str(tmp_path)))
    assert "bad.jsonl line 401 is not JSON (a number has too many digits)" in line
    corpus, skipped = Jsonl(path=str(tmp_path), on_error="skip"), Counter[str]()
    assert sum(len(list(corpus.read(part, skipped))) for part in corpus.parts()) == 400
    assert skipped == {"not JSON": 1}


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LINE_BYTES", 1 << 16)
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"x" * (1 << 20)))
    assert "bad.jsonl.gz line 1 has more than 65,536 bytes" in refusal(Jsonl(path=str(tmp_path), on_error="skip"))


def test_a_byte_order_mark_is_removed(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": LINES, "b.jsonl.gz": gzip.compress(codecs.BOM_UTF8 + LINES)}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + LINES)
    found = [content for _, content in Jsonl(path=str(tmp_path))]
    assert found == 2 * [json.loads(line)["text"].encode() for line in LINES.splitlines()]
    (tmp_path / "t.txt").write_bytes(codecs.BOM_UTF8 + b"text")
    (tmp_path / "u.txt").write_bytes(codecs.BOM_UTF8)
    corpus, skipped = Text(path=str(tmp_path / "t.txt")), Counter[str]()
    assert [content for part in corpus.parts() for _, content in corpus.read(part, skipped)] == [b"text"]
    with pytest.raises(ValueError, match="holds no text"):
        list(Text(path=str(tmp_path / "u.txt")))


@pytest.fixture
def strange(tmp_path: Path) -> dict[str, str]:
    """Paths that are no regular files: reading one of them may never end."""
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    return {"device": "/dev/zero", "pipe": str(tmp_path / "pipe"), "socket": str(tmp_path / "socket")}


@pytest.mark.parametrize("corpus", [Text, Jsonl, Parquet, HuggingFace])
def test_a_device_a_pipe_or_a_socket_is_refused(strange: dict[str, str], corpus: Any) -> None:
    for kind, path in strange.items():
        line = refusal(corpus(path=path), check=True)
        assert line == f"data.path={path}: is a {kind}; must be a regular file or a folder"


def test_a_device_in_place_of_megatrons_files_is_refused(tmp_path: Path) -> None:
    for name in ("x.idx", "x.bin"):
        os.mkfifo(tmp_path / name)
    assert "x.idx: is a pipe" in refusal(Megatron(path=str(tmp_path / "x")), check=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("corpus", [Text, Jsonl, Parquet, HuggingFace])
@pytest.mark.parametrize("name", ["x" * 300, "x\0y"])
def test_a_name_that_no_file_has_is_one_line(corpus: Any, name: str) -> None:
    assert refusal(corpus(path=f"/tmp/{name}"), check=True).startswith("data.path=/tmp/x")


def test_what_lies_beside_a_corpus_is_counted(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (folder / "inner").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("a.jsonl", "B.JSONL", "inner/c.json"):
        (folder / name).write_bytes(LINES)
    (folder / "empty.jsonl").touch()
    (folder / ".hidden.jsonl").write_bytes(LINES)
    (folder / "notes.md").write_text("notes")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    corpus = Jsonl(path=str(folder))
    corpus.check()
    assert {name for name, _ in corpus} == {"a.jsonl", "B.JSONL", "inner/c.json"}
    assert corpus.left_out() == {
        "linked folders": 1,
        "hidden files or folders": 1,
        "files with another suffix": 1,
        "links to nothing, devices or pipes": 2,
        "empty": 1,
    }
    text = Text(path=str(folder))
    assert text.left_out() == {
        "linked folders": 1,
        "hidden files or folders": 1,
        "links to nothing, devices or pipes": 2,
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of texts in which farspan has run: a run, a checkpoint that was moved, a sweep, a store and its index,
    and an exported model."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.jsonl").write_text('{"text": "record"}\n')
    (tmp_path / "config.yaml").write_text("title: a configuration of something else\n")
    run = "model:\n  dim: 32\ncode:\n  version: 0.1.0\n"
    files = {
        "runs/first/config.yaml": run,
        "runs/first/metrics.jsonl": '{"text": "metrics"}\n',
        "runs/first/checkpoints/step-1/manifest.json": "{}",
        "moved/config.yaml": run,
        "moved/corpus.json": "{}",
        "runs/rates/sweep.json": json.dumps({"name": "rates", "members": []}, indent=1),
        "runs/rates/table.txt": "table",
        "store/card.json": "{}",
        "store/offsets.npy": "x",
        "store/hashes.npy": "x",
        "store/sources.txt": "a.txt",
        "store.index/0123/index.json": json.dumps({"counts": {}, "facts": {}}, indent=1),
        "exported/config.json": "{}",
        "exported/model.safetensors": "x",
        "cache/fonts.json": "fonts",
        "tagged/CACHEDIR.TAG": "Signature: 8a477f597d28d172789f06886806bc55",
        "tagged/x.txt": "cached",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_what_farspan_has_written_is_no_part_of_a_corpus(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("XDG_CACHE_HOME", str(project / "cache"))
    corpus = Text(path=".")
    corpus.check()
    assert [name for name, _ in corpus] == ["a.jsonl", "a.txt", "config.yaml"]
    assert corpus.left_out() == {"folders of runs, stores, models or caches": 8}
    for path in (".", "**/*.jsonl", "./**/*.jsonl", f"{project}/**/*.jsonl"):
        assert [content for _, content in Jsonl(path=path)] == [b"record"], path
    for path in ("runs/first", "store", "moved"):
        with pytest.raises(
            ValueError, match=f"data.path={path}: holds no text; .*1 folders of runs, stores, models or caches"
        ):
            Text(path=path).check()
    before = corpus.identity()
    for folder in ("runs", "store", "cache", "exported", "moved"):
        shutil.rmtree(project / folder)
    assert corpus.identity() == before
    assert [name for name, _ in Text(path="tagged")] == ["CACHEDIR.TAG", "x.txt"]  # asked for by name
