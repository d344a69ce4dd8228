"""Megatron-core's format: byte by byte by its public layout, and, where megatron-core is installed, by its own code."""

import struct
from pathlib import Path

import numpy as np
import pytest

from data.corpora.corpus import Text
from data.stores.indexed import TokenIndex, smallest, write_index
from data.stores.store import build
from data.tokenizer import Bytes
from tests.data import prose, store_of, write


def test_an_index_has_the_bytes_of_the_public_layout(tmp_path: Path) -> None:
    write_index(tmp_path / "x.idx", np.array([0, 3, 3, 10]), "<u2")
    assert (tmp_path / "x.idx").read_bytes() == b"".join(
        [
            b"MMIDIDX\x00\x00",
            struct.pack("<QBQQ", 1, 8, 3, 4),
            struct.pack("<3i", 3, 0, 7),
            struct.pack("<3q", 0, 6, 6),
            struct.pack("<4q", 0, 1, 2, 3),
        ]
    )


@pytest.mark.parametrize(("dtype", "code"), [("u1", 1), ("<i4", 4), ("<i8", 5), ("<u2", 8)])
def test_what_is_written_is_read(tmp_path: Path, dtype: str, code: int) -> None:
    offsets = np.array([0, 5, 6, 106])
    write_index(tmp_path / "x.idx", offsets, dtype)
    index = TokenIndex(tmp_path / "x.idx")
    index.check()
    assert (tmp_path / "x.idx").read_bytes()[17] == code
    assert index.dtype == np.dtype(dtype) and index.tokens == 106
    assert index.lengths.tolist() == [5, 1, 100]
    assert [index.offset(document) for document in range(4)] == offsets.tolist()


def test_documents_of_several_sequences_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 4, 3, 3)
        + struct.pack("<3i", 2, 3, 4)
        + struct.pack("<3q", 0, 8, 20)
        + struct.pack("<3q", 0, 2, 3)
    )
    index = TokenIndex(tmp_path / "x.idx")
    index.check()
    assert [index.offset(document) for document in range(3)] == [0, 5, 9]


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (0, b"NO", "is no index"),
        (9, b"\x02", "is of version 2, expected 1"),
        (17, b"\x07", "is of type 7, which holds no tokens"),
        (18, b"\xff\xff", "is cut short"),
    ],
)
def test_another_head_is_refused(tmp_path: Path, place: int, value: bytes, line: str) -> None:
    write_index(tmp_path / "x.idx", np.array([0, 5]), "<u2")
    content = bytearray((tmp_path / "x.idx").read_bytes())
    content[place : place + len(value)] = value
    (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(ValueError, match=line):
        TokenIndex(tmp_path / "x.idx")


def test_an_index_cut_short_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path / "x.idx", np.array([0, 5, 9]), "<u2")
    content = (tmp_path / "x.idx").read_bytes()
    for size in range(len(content)):
        (tmp_path / "x.idx").write_bytes(content[:size])
        with pytest.raises(ValueError):
            TokenIndex(tmp_path / "x.idx")


def test_sequences_that_do_not_lie_end_to_end_are_found(tmp_path: Path) -> None:
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i", 3, 4)
    for pointers, documents in (((0, 8), (0, 1, 2)), ((2, 8), (0, 1, 2)), ((0, 6), (0, 2, 1)), ((0, 6), (1, 1, 2))):
        (tmp_path / "x.idx").write_bytes(head + struct.pack("<2q", *pointers) + struct.pack("<3q", *documents))
        with pytest.raises(ValueError, match="its index has"):
            TokenIndex(tmp_path / "x.idx").check()


def test_types_are_those_that_megatron_takes() -> None:
    assert [smallest(size).str for size in (257, 65499, 65500, 200_000)] == ["<u2", "<u2", "<i4", "<i4"]


def test_megatron_opens_a_store(tmp_path: Path) -> None:
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    store = store_of(tmp_path, prose(50, 300))
    opened = theirs.IndexedDataset(str(store.folder / "tokens"))
    assert len(opened) == len(store) and opened.document_indices.tolist() == list(range(len(store) + 1))
    assert all(np.array_equal(opened[i], store.document(i)) for i in range(len(store)))


def test_a_store_has_the_bytes_that_megatron_writes(tmp_path: Path) -> None:
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    contents = prose(50, 300)
    store = build(Text(path=str(write(tmp_path / "texts", contents))), Bytes(), tmp_path / "store")
    torch = pytest.importorskip("torch")
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for content in contents:
        tokens = [256, *content]
        builder.add_document(torch.tensor(tokens, dtype=torch.int32), [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in ("bin", "idx"):
        assert (tmp_path / f"theirs.{end}").read_bytes() == (store.folder / f"tokens.{end}").read_bytes()
