"""A damaged store is found by its checksums, or by what offsets and tokens must be, and by name."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.audit import audit
from data.corpora.corpus import Text
from data.corpora.megatron import Megatron
from data.corpora.records import Jsonl
from data.loader import Data
from data.stores import card, checks
from data.stores.checks import CHECKSUMS, verify
from data.stores.prepare import DATA
from data.stores.store import Store, build
from data.tokenizer import Bytes, Given
from tests.data import prose, store_of, write


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PART_BYTES", 1000)
    monkeypatch.setattr(card, "draw", lambda *_: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_of(tmp_path, prose(60, 300))


def old(store: Store) -> Store:
    """As it was made before there were checksums."""
    (store.folder / CHECKSUMS).unlink(missing_ok=True)
    facts = json.loads((store.folder / "card.json").read_text())
    facts["files"].pop(CHECKSUMS, None)
    facts.pop("unknown", None)
    (store.folder / "card.json").write_text(json.dumps(facts))
    return Store(store.folder)


def resigned(store: Store) -> Store:
    """An old store whose fingerprint fits what it holds now."""
    store = old(store)
    facts = json.loads((store.folder / "card.json").read_text())
    content = (store.folder / "tokens.bin").read_bytes() + np.load(store.folder / "offsets.npy").tobytes()
    facts["fingerprint"] = hashlib.sha256(content).hexdigest()
    (store.folder / "card.json").write_text(json.dumps(facts))
    return Store(store.folder)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def edit(store: Store, name: str, change: Any) -> None:
    """Changes an array of the store in place."""
    found = np.load(store.folder / name)
    change(found)
    np.save(store.folder / name, found)


def test_a_whole_store_is_whole(store: Store) -> None:
    done, of = verify(store)
    sizes = [(store.folder / name).stat().st_size for name in DATA]
    assert done == of == sum(-(-size // 1000) for size in sizes)
    assert verify(old(store))[0] > 0


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("where", [0.3, 0.999])
def test_a_flipped_bit_is_found_in_every_file(store: Store, name: str, where: float) -> None:
    size = (store.folder / name).stat().st_size
    flip(store.folder / name, place := int(where * size))
    begin = place // 1000 * 1000
    said = rf"^data\.store=.*: {name} is not what was written \(bytes {begin:,} to {min(begin + 1000, size):,} are dam"
    with pytest.raises(ValueError, match=f"{said}|not a complete token store"):
        verify(Store(store.folder))


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy"])
def test_a_flipped_bit_is_found_in_a_store_without_checksums(store: Store, name: str) -> None:
    size = (store.folder / name).stat().st_size
    old(store)
    flip(store.folder / name, size // 2 // 8 * 8)
    with pytest.raises(ValueError, match=r"^data\.store=.*: (its tokens and offsets are|offsets\.npy does not)"):
        verify(Store(store.folder))


@pytest.mark.parametrize("how", ["swapped", "negative", "equal"])
def test_offsets_that_do_not_ascend_are_found(store: Store, how: str) -> None:
    def change(offsets: Any) -> None:
        if how == "swapped":
            offsets[[20, 21]] = offsets[[21, 20]]
        else:
            offsets[21] = -5 if how == "negative" else offsets[20]

    edit(store, "offsets.npy", change)
    with pytest.raises(ValueError, match=r"^data\.store=.*: offsets\.npy does not ascend at document 20"):
        verify(resigned(store))


def test_a_token_out_of_range_names_store_and_document(store: Store, tmp_path: Path) -> None:
    begin = int(store.offsets[7])
    content = np.fromfile(store.folder / "tokens.bin", "<u2")
    content[begin + 1] = 9999
    content.tofile(store.folder / "tokens.bin")
    said = r"^data\.store=.*store: document 7 \(007\.txt\) has token 9999, out of the tokenizer's 257"
    with pytest.raises(ValueError, match=said):
        verify(resigned(store))
    keys = {"max_length": 16, "heldout": 0.2, "heldout_tokens": 64}
    batches = Data(corpus="store", store=str(store.folder), **keys).open(64)
    with pytest.raises(ValueError, match=said):
        [batches.batch(0, step) for step in range(200)]
        batches.heldout()


def test_the_start_of_a_run_is_bounded(store: Store) -> None:
    begun = time.monotonic()
    done, of = verify(store, 0.0)
    assert done < of and time.monotonic() - begun < 5
    assert verify(store, 60.0) == (of, of)
    assert verify(old(store), 0.0)[0] < of


def test_an_audit_reads_all_of_it(store: Store) -> None:
    keys = {"max_length": 16, "heldout": 0.2, "heldout_tokens": 64}
    batches = Data(corpus="store", store=str(store.folder), **keys).open(64)
    assert "each is what was written" in audit(batches, 0, 3)[-1]
    flip(store.folder / "tokens.bin", 4321)
    with pytest.raises(ValueError, match=r"tokens\.bin is not what was written"):
        audit(batches, 0, 3)


def test_a_corpus_that_stays_where_it_is_has_checksums_too(store: Store, tmp_path: Path) -> None:
    there = build(Megatron(path=str(store.folder)), Given(None, None), tmp_path / "there")
    assert verify(there)[0] > 10
    flip(store.folder / "tokens.bin", 2000)
    with pytest.raises(ValueError, match=r"there: tokens\.bin is not what was written .bytes 2,000 to 3,000"):
        verify(there)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", []),
        ("files", {"../../etc/passwd": 1}),
        ("files", {}),
        ("tokens", "many"),
        ("skipped", None),
        ("fingerprint", 7),
        ("at", "/dev/zero"),
        ("version", None),
        ("length_percentiles", {"1": []}),
    ],
)
def test_a_card_of_other_types_is_no_store(store: Store, key: str, value: Any) -> None:
    facts = json.loads((store.folder / "card.json").read_text())
    (store.folder / "card.json").write_text(json.dumps({**facts, key: value}))
    with pytest.raises(ValueError, match=r"^data\.store=.*: not a complete token store") as error:
        Store(store.folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*DATA, "card.json"])
def test_a_pipe_in_place_of_a_file_is_no_store(store: Store, name: str) -> None:
    (store.folder / name).unlink()
    os.mkfifo(store.folder / name)
    with pytest.raises(ValueError, match="not a complete token store"):
        Store(store.folder)


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n{no json\n')
    with pytest.raises(ValueError, match="x.jsonl line 2 is not JSON"):
        build(Jsonl(path=str(tmp_path / "x.jsonl")), Bytes(), tmp_path / "new" / "inner" / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    store = build(Text(path=str(write(tmp_path / "texts", [b"text"]))), Bytes(), tmp_path / "store")
    with pytest.raises(ValueError, match="x.jsonl line 2 is not JSON"):
        build(Jsonl(path=str(tmp_path / "x.jsonl")), Bytes(), tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "texts", "x.jsonl"]
    assert verify(Store(store.folder))[0] > 0


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    texts = Text(path=str(write(tmp_path / "texts", [b"text"])))
    with pytest.raises(ValueError, match=r"^data\.store=/proc/none/store: cannot be written \(No such file or dir"):
        build(texts, Bytes(), "/proc/none/store")
