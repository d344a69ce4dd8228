import os
from pathlib import Path
from typing import IO, Any

import pytest

from data.corpora.corpus import CORPORA, HEAD, Corpus, Stdlib, Text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "b.txt": b"bee",
        "a/z.md": "zëd".encode(),
        "a.txt": b"ay",
        "empty.txt": b"",
        "binary.dat": b"text then \0",
        "latin.txt": b"caf\xe9",
        ".hidden": b"no",
        ".git/config": b"no",
        "a/.swap": b"no",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return tmp_path


def test_text_reads_a_folder_in_path_order_and_only_its_text(folder: Path) -> None:
    corpus = Text(path=str(folder))
    corpus.check()
    assert list(corpus) == [("a.txt", b"ay"), ("a/z.md", "zëd".encode()), ("b.txt", b"bee")]


def test_text_reads_one_file(folder: Path) -> None:
    corpus = Text(path=str(folder / "b.txt"))
    corpus.check()
    assert list(corpus) == [("b.txt", b"bee")]


def test_text_identity_follows_the_files(folder: Path) -> None:
    def identity() -> dict[str, str | int]:
        return Text(path=str(folder)).identity()

    first = identity()
    assert identity() == first
    (folder / "b.txt").write_bytes(b"bees")
    longer = identity()
    os.utime(folder / "a.txt", ns=(0, 0))
    touched = identity()
    (folder / "a.txt").rename(folder / "c.txt")
    assert len({str(i) for i in (first, longer, touched, identity())}) == 4


def test_check_stops_at_the_first_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = [], Path.open

    def spy(path: Path, mode: str) -> IO[Any]:
        opened.append(path.name)
        return real(path, mode)

    monkeypatch.setattr(Path, "open", spy)
    Text(path=str(folder)).check()
    assert opened == ["a.txt"]


def test_check_allows_a_character_across_the_end_of_the_head(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(b"x" * (HEAD - 1) + "é".encode())
    Text(path=str(tmp_path)).check()
    (tmp_path / "long.txt").write_bytes(b"x" * (HEAD - 2) + b"\xc3")
    with pytest.raises(ValueError, match="holds no text"):
        Text(path=str(tmp_path)).check()


def test_text_refuses_in_one_line(folder: Path) -> None:
    def refusal(path: str | None) -> str:
        with pytest.raises(ValueError) as error:
            Text(path=path).check()
        return str(error.value)

    assert refusal(None) == "data.path=null: corpus text needs a file or a folder"
    assert refusal(f"{folder}/none") == f"data.path={folder}/none: no such file or folder"
    for name in ("empty.txt", "binary.dat", "latin.txt"):
        assert refusal(f"{folder}/{name}") == f"data.path={folder}/{name}: holds no text; expected UTF-8 files"


def test_text_whose_only_file_turns_out_binary_is_refused_when_read(tmp_path: Path) -> None:
    (tmp_path / "late.txt").write_bytes(b"x" * HEAD + b"\0")
    corpus = Text(path=str(tmp_path))
    corpus.check()
    with pytest.raises(ValueError, match="holds no text"):
        list(corpus)


def test_stdlib_is_the_source_of_this_python() -> None:
    corpus = Stdlib()
    corpus.check()
    documents = list(corpus)
    names = [name for name, _ in documents]
    assert names == sorted(set(names))
    assert dict(documents)["os.py"] == Path(os.__file__).read_bytes()
    assert "json/decoder.py" in names
    assert not [name for name in names if {"site-packages", "dist-packages"} & set(name.split("/"))]
    assert all(name.endswith(".py") and content for name, content in documents)
    identity = corpus.identity()
    assert identity == Stdlib().identity()
    assert identity["bytes"] == sum(len(content) for _, content in documents)


def test_stdlib_takes_no_path() -> None:
    with pytest.raises(ValueError, match=r"^data\.path=here: corpus stdlib takes no path"):
        Stdlib(path="here").check()


@pytest.mark.parametrize("name", CORPORA)
def test_corpora_are_registered_under_their_own_name(name: str) -> None:
    corpus: type[Corpus] = CORPORA[name]
    assert corpus.name == name
