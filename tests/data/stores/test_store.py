import errno
import fcntl
import hashlib
import json
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data.corpora.corpus import Text
from data.corpora.files import CorpusPart
from data.stores.prepare import FILES
from data.stores.store import Store, build
from data.tokenizer import Bytes
from tests.data import prose, store_of, write

CONTENTS = [b"one", "zwei ü".encode(), b"one", b"4" * 1000]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def inode(store: Store) -> int:
    return (store.folder / "tokens.bin").stat().st_ino


def test_bytes_round_trip() -> None:
    ids = Bytes().encode(bytes(range(256)))
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(range(256))
    assert Bytes().decode([Bytes.DOCUMENT, 104, 105, Bytes.DOCUMENT]) == b"hi"


def test_a_store_holds_the_documents(tmp_path: Path) -> None:
    store = store_of(tmp_path, CONTENTS)
    assert len(store) == len(CONTENTS)
    assert (store.tokens.dtype, store.offsets.dtype, store.hashes.dtype) == (np.uint16, np.int64, np.uint64)
    for i, content in enumerate(CONTENTS):
        assert store.document(i).tolist() == [256, *content]
        assert int(store.hashes[i]) == int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    lengths = [1 + len(content) for content in CONTENTS]
    assert store.offsets.tolist() == [sum(lengths[:i]) for i in range(len(CONTENTS) + 1)]


def test_the_card_counts(tmp_path: Path) -> None:
    store = store_of(tmp_path, CONTENTS)
    card = json.loads((tmp_path / "store" / "card.json").read_text())
    assert card["documents"] == 4
    assert card["duplicates"] == 1
    assert card["bytes"] == sum(map(len, CONTENTS))
    assert card["tokens"] == card["bytes"] + 4
    assert card["length_percentiles"]["50"] == (4 + 8) // 2
    assert card["length_percentiles"]["100"] == 1001
    assert card["tokenizer"] == "bytes"
    assert card["identity"] == Text(path=str(tmp_path / "texts")).identity()
    content = (tmp_path / "store" / "tokens.bin").read_bytes() + store.offsets.tobytes()
    assert card["fingerprint"] == store.fingerprint == hashlib.sha256(content).hexdigest()


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    here = store_of(tmp_path / "here", [b"ab", b"c"]).fingerprint
    assert store_of(tmp_path / "there", [b"ab", b"c"]).fingerprint == here
    assert store_of(tmp_path / "other", [b"ab", b"d"]).fingerprint != here


class Unread(Text):
    """A corpus that fails after its first document, as a build cut short would."""

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        yield "first", b"first"
        raise KeyboardInterrupt


def test_a_store_of_the_same_identity_is_reused_without_reading_or_writing(tmp_path: Path) -> None:
    store = store_of(tmp_path, CONTENTS)
    again = build(Unread(path=str(tmp_path / "texts")), Bytes(), tmp_path / "store")
    assert inode(again) == inode(store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "texts"]


def test_a_store_of_another_identity_is_replaced(tmp_path: Path) -> None:
    store_of(tmp_path, CONTENTS)
    store = store_of(tmp_path, [b"changed", b"too"])
    assert store.document(0).tolist() == [256, *b"changed"]
    assert visible(tmp_path) == ["store", "texts"]


def test_a_build_cut_short_leaves_no_store_and_the_next_goes_on(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts", CONTENTS)
    with pytest.raises(KeyboardInterrupt):
        build(Unread(path=str(texts)), Bytes(), tmp_path / "store")
    assert visible(tmp_path) == [".store.partial", "texts"]
    store = build(Text(path=str(texts)), Bytes(), tmp_path / "store")
    assert store.document(0).tolist() == [256, *CONTENTS[0]]
    assert visible(tmp_path) == ["store", "texts"]


@pytest.mark.parametrize("name", [*FILES, "card.json"])
def test_half_a_store_is_ignored_and_built_again(tmp_path: Path, name: str) -> None:
    whole = store_of(tmp_path, CONTENTS)
    file = tmp_path / "store" / name
    content = file.read_bytes()
    for remains in (None, 0, 0.5):
        file.unlink()
        if remains is not None:
            file.write_bytes(content[: int(remains * len(content)) // 2 * 2])
        with pytest.raises(ValueError, match=r"^data\.store=.*: not a complete token store"):
            Store(tmp_path / "store")
        again = build(Text(path=str(tmp_path / "texts")), Bytes(), tmp_path / "store")
        assert again.fingerprint == whole.fingerprint
        assert file.read_bytes() == content


@pytest.mark.parametrize("name", ["offsets.npy", "hashes.npy", "sources.npy"])
def test_files_that_disagree_are_no_store(tmp_path: Path, name: str) -> None:
    """The sidecar of another store, though the card names its size."""
    store = store_of(tmp_path, CONTENTS)
    np.save(store.folder / name, np.load(store.folder / name)[:-1])
    card = json.loads((store.folder / "card.json").read_text())
    card["files"][name] = (store.folder / name).stat().st_size
    with pytest.raises(ValueError, match=f"{name} has [0-9]+ bytes, its card says"):
        Store(store.folder)
    (store.folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="its files disagree with its card"):
        Store(store.folder)


def test_a_folder_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"^data\.store=.*: holds other files"):
        store_of(tmp_path, CONTENTS)
    assert visible(tmp_path / "store") == ["thesis.tex"]


def _build(folder: Path, ready, fingerprints) -> None:
    ready.wait()
    store = build(Text(path=str(folder / "texts")), Bytes(), folder / "store")
    fingerprints.put((store.fingerprint, hashlib.sha256(store.tokens.tobytes()).hexdigest()))


def test_processes_that_build_at_once_all_end_with_a_good_store(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    write(tmp_path / "texts", prose(200, 2000))
    ready, fingerprints = spawn.Barrier(3), spawn.Queue()
    processes = [spawn.Process(target=_build, args=(tmp_path, ready, fingerprints)) for _ in range(3)]
    for process in processes:
        process.start()
    seen = {fingerprints.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = Store(tmp_path / "store")
    assert seen == {(store.fingerprint, hashlib.sha256(store.tokens.tobytes()).hexdigest())}
    assert visible(tmp_path) == ["store", "texts"]


class Overtaken(Text):
    """A corpus whose store a rival finishes while it is being read."""

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        assert self.path is not None
        self.rival = inode(build(Text(path=self.path), Bytes(), Path(self.path).parent / "store"))
        yield from super().read(part, skipped)


def test_without_locks_the_first_store_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    corpus = Overtaken(path=str(write(tmp_path / "texts", CONTENTS)))
    store = build(corpus, Bytes(), tmp_path / "store")
    assert inode(store) == corpus.rival
    assert store.document(0).tolist() == [256, *CONTENTS[0]]
    assert visible(tmp_path) == ["store", "texts"]


def test_a_pickled_store_is_a_path(tmp_path: Path) -> None:
    store = store_of(tmp_path, [b"x" * 100_000])
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).fingerprint == store.fingerprint
