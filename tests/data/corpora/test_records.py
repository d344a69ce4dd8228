"""JSON lines, Parquet and Hugging Face datasets: the same documents from each; what is wrong is said by its place."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.corpora import hub, records
from data.corpora.hub import HuggingFace
from data.corpora.records import Jsonl, Parquet, Records

TEXTS = [f"document {i} ü" * (i % 7 + 1) for i in range(300)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of some lines each, so that a small file has many."""
    monkeypatch.setattr(records, "PART_BYTES", 1000)
    monkeypatch.setattr(hub, "PART_BYTES", 1000)


def lines(path: Path, values: list[Any], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: value}) + "\n" for value in values))
    return path


def parquet(path: Path, values: list[Any], field: str = "text") -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": list(range(len(values))), field: values}), path, row_group_size=16)
    return path


def saved(path: Path, values: list[Any], field: str = "text") -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"id": list(range(len(values))), field: values}).save_to_disk(str(path))
    return path


MADE: dict[str, tuple[type[Records], Callable[..., Path]]] = {
    "x.jsonl": (Jsonl, lines),
    "x.parquet": (Parquet, parquet),
    "x": (HuggingFace, saved),
}


@pytest.fixture(params=MADE)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    kind, write = MADE[request.param]
    return lambda values, column="text", **keys: kind(path=str(write(tmp_path / request.param, values, column)), **keys)


def test_every_document_comes_once_in_order(made) -> None:
    corpus = made(TEXTS)
    corpus.check()
    assert len(list(corpus.parts())) > 5
    assert [content for _, content in corpus] == [text.encode() for text in TEXTS]
    assert corpus.identity() == type(corpus)(path=corpus.path).identity()


def test_the_identity_follows_the_content_and_what_is_read_of_it(made) -> None:
    first = made(TEXTS).identity()
    assert made(TEXTS[:-1]).identity() != first
    assert made(TEXTS, "body", field="body").identity() != first


@pytest.mark.parametrize(("bad", "said"), [("", "is an empty document"), (None, "has no text under data.field=text")])
def test_a_bad_document_stops_with_its_place_or_is_counted(made, bad: Any, said: str) -> None:
    values: list[Any] = [*TEXTS[:150], bad, *TEXTS[150:], bad]
    corpus = made(values)
    place = "line 151" if isinstance(corpus, Jsonl) else "row 150"
    with pytest.raises(ValueError, match=rf"^data\.path={corpus.path}: .*{place} {said}; data\.on_error=skip"):
        list(corpus)
    corpus, skipped = made(values, on_error="skip"), Counter[str]()
    found = [content for part in corpus.parts() for _, content in corpus.read(part, skipped)]
    assert found == [text.encode() for text in TEXTS]
    assert list(skipped.values()) == [2]


def test_another_field_is_refused_before_anything_is_read(made) -> None:
    corpus = made(TEXTS, field_asked := "body")
    if isinstance(corpus, Jsonl):
        with pytest.raises(ValueError, match="line 1 has no text under data.field=text"):
            list(corpus)
        return
    with pytest.raises(ValueError, match=rf"^data\.field=text: .* has no such column; it has id, {field_asked}"):
        corpus.check()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "x"', "is not JSON .Expecting ',' delimiter at column 13"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "has half a character"),
        (b'"text"', "has no text under data.field=text"),
        (b'{"text": 7}', "has no text under data.field=text"),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 29, 30, 299])
def test_a_line_that_cannot_be_read_is_named_by_its_number(tmp_path: Path, line: bytes, said: str, before: int) -> None:
    path = lines(tmp_path / "x.jsonl", TEXTS)
    every = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*every[:before], line + b"\n", *every[before:]]))
    with pytest.raises(ValueError, match=rf"x\.jsonl line {before + 1} {said}") as error:
        list(Jsonl(path=str(path)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert len(list(Jsonl(path=str(path), on_error="skip"))) == len(TEXTS)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10**6])
def test_lines_are_read_once_wherever_parts_are_cut(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PART_BYTES", size)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text":"a"}\n\n{"text":"bb"}\r\n   \n{"text":"ccc"}')  # the last without an end
    assert [content for _, content in Jsonl(path=str(path))] == [b"a", b"bb", b"ccc"]


def test_files_are_a_folder_a_pattern_or_packed(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "more/c.jsonl", "more/.hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        lines(tmp_path / name, [f"in {name}"])
    (tmp_path / "notes.txt").write_text("no records")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"text": "in d"}) + "\n")
    found = list(Jsonl(path=str(tmp_path)))
    assert [name for name, _ in found] == ["a.jsonl", "b.jsonl", "d.jsonl.gz", "more/c.jsonl"]
    assert found[2][1] == b"in d"
    assert [content for _, content in Jsonl(path=str(tmp_path / "[ab].jsonl"))] == [b"in a.jsonl", b"in b.jsonl"]


def test_what_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no parquet")
    for corpus, line in (
        (Jsonl(), "data.path=null: corpus jsonl needs"),
        (Jsonl(path=str(tmp_path / "no.jsonl")), f"data.path={tmp_path}/no.jsonl: no such file or folder"),
        (Jsonl(path=str(tmp_path / "*.jsonl")), f"data.path={tmp_path}/*.jsonl: holds no documents; expected files"),
        (Parquet(path=str(tmp_path)), f"data.path={tmp_path}: x.parquet is no Parquet file"),
        (Jsonl(path="x", on_error="ignore"), "data.on_error=ignore: must be one of stop, skip"),
    ):
        with pytest.raises(ValueError) as error:
            corpus.check()
        assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    corpus = Parquet(path=str(parquet(tmp_path / "x.parquet", TEXTS)), field="id")
    with pytest.raises(ValueError, match=r"^data\.field=id: must be text, x\.parquet has int64 there"):
        corpus.check()


def test_datasets_reads_splits_files_and_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parts = {"train": TEXTS[:100], "test": TEXTS[100:]}
    together = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": t}) for name, t in parts.items()})
    together.save_to_disk(str(tmp_path / "saved"))
    for split, texts in parts.items():
        corpus = HuggingFace(path=str(tmp_path / "saved"), split=split)
        assert [content for _, content in corpus] == [text.encode() for text in texts]
    with pytest.raises(ValueError, match=r"^data\.split=dev: must be one of train, test"):
        HuggingFace(path=str(tmp_path / "saved"), split="dev").check()
    (tmp_path / "files").mkdir()
    for i in range(3):
        lines(tmp_path / "files" / f"{i}.jsonl", TEXTS[i::3])
    for streaming in (False, True):
        corpus = HuggingFace(path=str(tmp_path / "files"), streaming=streaming)
        corpus.check()
        assert [content for _, content in corpus] == [text.encode() for i in range(3) for text in TEXTS[i::3]]
        assert len(list(corpus.parts())) == 3 or not streaming


def test_a_dataset_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"^data\.path=.*: datasets cannot open it") as error:
        HuggingFace(path=str(tmp_path / "nothing" / "here")).check()
    assert "\n" not in str(error.value)


def test_local_files_ask_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def asked(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", asked)
    folder = tmp_path / "files"
    folder.mkdir()
    for path in (lines(folder / "x.jsonl", TEXTS), parquet(tmp_path / "x.parquet", TEXTS), folder):
        corpus = HuggingFace(path=str(path))
        corpus.check()
        assert [content for _, content in corpus] == [text.encode() for text in TEXTS]
    for path in (tmp_path / "no.jsonl", "./no", "a/b/c", "no.parquet"):
        with pytest.raises(ValueError, match="datasets cannot open it .there is no such file or folder"):
            HuggingFace(path=str(path)).check()
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(ValueError, match=r"^data\.path=.*x\.bin: must be a file \.jsonl, "):
        HuggingFace(path=str(tmp_path / "x.bin")).check()


def test_datasets_reads_nothing_that_a_run_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    (folder / "runs" / "a").mkdir(parents=True)
    lines(folder / "x.jsonl", TEXTS)
    lines(folder / "runs" / "a" / "metrics.jsonl", ["metrics"])
    (folder / "runs" / "a" / "config.yaml").write_text("model: {}\ncode: {}\n")
    assert [content for _, content in HuggingFace(path=str(folder))] == [text.encode() for text in TEXTS]
