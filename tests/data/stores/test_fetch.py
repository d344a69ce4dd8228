"""A store is copied to a machine once, whoever asks; the copy has its fingerprint, or is none."""

import json
import multiprocessing
from pathlib import Path

import pytest

from data.loader import Data
from data.stores import fetch as room
from data.stores.fetch import fetch
from data.stores.store import Store
from tests.data import prose, store_of


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SHARD_BYTES", 1000)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_of(tmp_path / "shared", prose(80, 300))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_copy_is_the_store(store: Store, tmp_path: Path) -> None:
    folder = fetch(str(store.folder), tmp_path / "local")
    assert folder.parent == tmp_path / "local" and content(folder) == content(store.folder)
    assert Store(folder).fingerprint == store.fingerprint


def test_a_copy_that_is_there_is_not_read_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(str(store.folder), tmp_path / "local")
    read: list[str] = []
    real = room.StoreAddress.read
    monkeypatch.setattr(
        room.StoreAddress, "read", lambda self, name, *rest: read.append(name) or real(self, name, *rest)
    )
    assert fetch(str(store.folder), tmp_path / "local") == folder
    assert read == ["card.json"]


def test_cut_short_it_goes_on_behind_its_last_whole_shard(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int]] = []
    real = room.StoreAddress.read

    def cut(self, name: str, begin: int, end: int | None) -> bytes:
        if name == "tokens.bin" and begin >= 5000 and not any(begin == seen for _, seen in read):
            read.append((name, begin))
            raise KeyboardInterrupt
        read.append((name, begin))
        return real(self, name, begin, end)

    monkeypatch.setattr(room.StoreAddress, "read", cut)
    with pytest.raises(KeyboardInterrupt):
        fetch(str(store.folder), tmp_path / "local")
    assert not [path for path in (tmp_path / "local").iterdir() if not path.name.startswith(".")]
    read.clear()
    read.append(("tokens.bin", 5000))
    monkeypatch.setattr(room.StoreAddress, "read", lambda *a: read.append(a[1:3]) or real(*a))
    folder = fetch(str(store.folder), tmp_path / "local")
    assert content(folder) == content(store.folder)
    assert min(begin for name, begin in read if name == "tokens.bin") == 5000


def test_any_address_of_fsspec(store: Store, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in store.folder.iterdir():
        memory.pipe_file(f"/bucket/corpus/{path.name}", path.read_bytes())
    keys = {"max_length": 64, "heldout": 0.2, "heldout_tokens": 64}
    data = Data(corpus="store", store="memory://bucket/corpus", local=str(tmp_path / "local"), **keys)
    batches = data.open(256)
    there = Data(corpus="store", store=str(store.folder), **keys).open(256)
    assert batches.fingerprint == there.fingerprint
    assert [p.tokens.tolist() for p in batches.batch(0, 3)] == [p.tokens.tolist() for p in there.batch(0, 3)]


@pytest.mark.parametrize("damage", ["token", "offsets", "short", "name"])
def test_a_damaged_store_is_not_copied(store: Store, tmp_path: Path, damage: str) -> None:
    name = "offsets.npy" if damage == "offsets" else "tokens.bin"
    file = store.folder / name
    changed = bytearray(file.read_bytes())
    changed[-2] ^= 1
    card = json.loads((store.folder / "card.json").read_text())
    if damage == "name":
        card["files"]["../../outside"] = 4
        (store.folder / "card.json").write_text(json.dumps(card))
    else:
        file.write_bytes(bytes(changed[:-2] if damage == "short" else changed))
    line = {"short": "is shorter than its card says", "name": "names a file elsewhere"}.get(damage, "are not those")
    with pytest.raises(ValueError, match=rf"^data\.store=.*{line}"):
        fetch(str(store.folder), tmp_path / "local")
    assert not list((tmp_path / "local").glob("*"))  # nor a .partial, nor a .lock


def _fetch(folder: Path, local: Path, ready, said) -> None:
    room.SHARD_BYTES = 1000
    ready.wait()
    said.put(str(fetch(str(folder), local)))


def test_processes_that_ask_at_once_get_one_copy(store: Store, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, said = spawn.Barrier(3), spawn.Queue()
    processes = [spawn.Process(target=_fetch, args=(store.folder, tmp_path / "local", ready, said)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {said.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1 and content(Path(found.pop())) == content(store.folder)


def test_what_cannot_be_had_is_one_line(store: Store, tmp_path: Path) -> None:
    local = str(tmp_path / "local")
    for keys, line in (
        ({"store": None}, "data.store=null: must be the folder"),
        ({"store": f"{tmp_path}/no"}, f"data.store={tmp_path}/no: not a complete token store"),
        ({"store": "memory://nothing"}, "data.local=null: must be a folder that memory://nothing can be copied to"),
        ({"store": "memory://nothing", "local": local}, "data.store=memory://nothing: not a complete token store"),
        ({"store": "nope://x", "local": local}, "data.store=nope://x: Protocol not known"),
        ({"store": str(store.folder), "path": "x"}, "data.path=x: corpus store takes no path"),
    ):
        with pytest.raises(ValueError) as error:
            Data(corpus="store", **keys).check()
        assert str(error.value).startswith(line) and "\n" not in str(error.value), error.value
    with pytest.raises(ValueError, match=r"^data\.store=s3://bucket/x: must be a folder"):
        Data(corpus="stdlib", store="s3://bucket/x").check()
