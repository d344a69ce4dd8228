"""A corpus in Megatron's format is read where it lies: its tokens are neither copied nor changed; all are checked."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from data.corpora import megatron
from data.loader import Data
from data.stores import prepare
from data.stores.indexed import write_index
from data.stores.store import Store

EOD = 7
DOCUMENTS = [[*range(10, 10 + n), EOD] for n in (3, 1, 500, 40, 2, 77, 3000, 5)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "PART_BYTES", 1000)
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)


def corpus(folder: Path, documents: list[list[int]] = DOCUMENTS, dtype: str = "<i4") -> Path:
    folder.mkdir(exist_ok=True)
    tokens = np.concatenate([np.array(document, dtype) for document in documents])
    (folder / "corpus.bin").write_bytes(tokens.tobytes())
    write_index(folder / "corpus.idx", np.concatenate([[0], np.cumsum([len(d) for d in documents])]), dtype)
    return folder / "corpus"


def made(path: Path | str, **keys) -> Store:
    where = Path(str(path)).parent / "store"
    return Store(Data(corpus="megatron", path=str(path), tokenizer="ids", store=str(where), **keys).prepare())


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_used_in_place(tmp_path: Path, dtype: str, workers: int) -> None:
    path = corpus(tmp_path / "corpus", dtype=dtype)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    store = made(path, workers=workers)
    assert len(store) == len(DOCUMENTS) and not store.opened and store.dtype == np.dtype(dtype)
    for i, document in enumerate(DOCUMENTS):
        assert store.document(i).tolist() == document
        content = np.array(document, dtype).tobytes()
        assert int(store.hashes[i]) == int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    assert not (store.folder / "tokens.bin").exists()
    assert {name: (path.parent / name).read_bytes() for name in before} == before
    assert (store.card["tokens"], store.card["vocabulary"]) == (sum(map(len, DOCUMENTS)), 3010)
    assert store.tokenizer.DOCUMENT == EOD


def test_a_path_may_name_either_file(tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus")
    assert {made(f"{path}{end}").fingerprint for end in ("", ".bin", ".idx")} == {made(path).fingerprint}


def test_batches_never_predict_across_documents(tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus", [[*range(10, 10 + n % 50 + 3), EOD] for n in range(200)])
    keys = {"max_length": 32, "heldout": 0.2, "heldout_tokens": 64}
    data = Data(corpus="megatron", path=str(path), tokenizer="ids", store=str(tmp_path / "s"), **keys)
    batches = data.open(128)
    scored = 0
    for step in range(30):
        for packed in batches.batch(0, step):
            follows = packed.targets != -100
            assert not (packed.tokens[follows] == EOD).any()
            inside = packed.targets[follows] == packed.tokens[follows] + 1
            assert (inside | (packed.targets[follows] == EOD)).all()
            scored += int(follows.sum())
    assert scored > 2000


def test_another_content_makes_another_sidecar(tmp_path: Path) -> None:
    first = made(corpus(tmp_path / "corpus")).fingerprint
    again = made(corpus(tmp_path / "corpus", [*DOCUMENTS[:-1], [10, 11, 12, 13, 14, 99, EOD]]))
    assert again.fingerprint != first and again.document(7).tolist()[-2:] == [99, EOD]


@pytest.mark.parametrize("change", ["cut", "grown"])
def test_a_bin_of_another_size_is_refused(tmp_path: Path, change: str) -> None:
    path = corpus(tmp_path / "corpus")
    content = path.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(content[:-4] if change == "cut" else content + b"1234")
    with pytest.raises(ValueError, match=rf"^data\.path={path}: corpus\.bin has .* bytes, its index .*: truncated"):
        made(path)


def test_a_sidecar_is_not_taken_for_whole_when_the_tokens_have_gone(tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus")
    store = made(path)
    path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a complete token store"):
        Store(store.folder)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"vocabulary": 3009}, "data.tokenizer: the corpus has token 3009, out of its 3,009"),
        ({"tokenizer": "bytes"}, "data.tokenizer: the corpus has token 509, out of its 257"),
        ({"tokenizer": "bpe"}, "data.tokenizer=bpe: corpus megatron is tokenised already"),
        ({"field": "body"}, "data.field=body: corpus megatron takes none"),
        ({"path": None}, "data.path=null: corpus megatron needs"),
        ({"path": "no/where"}, "data.path=no/where: there is no where.idx beside it"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, keys: dict, line: str) -> None:
    chosen = {"path": str(corpus(tmp_path / "corpus")), "tokenizer": "ids", "store": str(tmp_path / "store")} | keys
    with pytest.raises(ValueError) as error:
        Data(corpus="megatron", **chosen).prepare()
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_negative_token_is_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.tokenizer: the corpus has token -1"):
        made(corpus(tmp_path / "corpus", [[5, EOD], [6, -1, EOD]]))


def test_an_index_with_gaps_is_refused(tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus", [[5, EOD], [6, EOD]], "<u2")
    content = bytearray(path.with_suffix(".idx").read_bytes())
    content[34 + 8 : 34 + 8 + 8] = struct.pack("<q", 2)  # the first sequence's pointer
    path.with_suffix(".idx").write_bytes(content)
    with pytest.raises(ValueError, match=r"^data\.path=.*: its index has sequences that do not lie end to end"):
        made(path)


def test_ids_are_of_megatron_only(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match=r"^data\.tokenizer=ids: corpus text is text"):
        Data(corpus="text", path=str(tmp_path / "x.txt"), tokenizer="ids").check()
