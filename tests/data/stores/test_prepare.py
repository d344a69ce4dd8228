"""A store is the same bytes whoever makes it and however often it is interrupted; half of one is never taken for it."""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.corpora import files, records
from data.corpora.corpus import Stdlib, Text
from data.corpora.files import CorpusPart
from data.corpora.records import Jsonl
from data.stores import merge, prepare
from data.stores.indexed import smallest
from data.stores.parts import Processes
from data.stores.prepare import PrepareProgress
from data.stores.store import Store, build
from data.tokenizer import Bytes, Given, Untrained
from tests.data import prose, write

PARTS = 12


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts of a small corpus, processes for it, and a journal after each."""
    monkeypatch.setattr(files, "PART_BYTES", 4000)
    monkeypatch.setattr(records, "PART_BYTES", 4000)
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    monkeypatch.setattr(merge, "JOURNAL_S", 0.0)


@pytest.fixture
def corpus(tmp_path: Path) -> Jsonl:
    """Documents of one byte to some thousand, in two files, some of them twice."""
    contents = prose(150, 600, seed=1)
    for name, part in (("a", contents), ("b", contents[:30] + prose(20, 3000, seed=2))):
        text = "".join(json.dumps({"text": content.decode()}) + "\n" for content in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return Jsonl(path=str(tmp_path / "*.jsonl"))


def content(store: Store) -> dict[str, str]:
    """The hash of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.folder.iterdir())}


TOKENIZERS = {"bytes": Bytes, "bpe": lambda: Untrained(300)}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_same_bytes_at_any_number_of_processes(corpus: Jsonl, tmp_path: Path, tokenizer: str) -> None:
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    assert len(list(corpus.parts())) >= PARTS
    made = [build(corpus, TOKENIZERS[tokenizer](), tmp_path / f"{n}", workers=n) for n in (1, 2, 3)]
    assert content(made[0]) == content(made[1]) == content(made[2])
    tokenizer_of = made[0].tokenizer
    for i, (_, text) in enumerate(corpus):
        assert made[0].document(i)[0] == tokenizer_of.DOCUMENT
        assert tokenizer_of.decode(made[0].document(i)[1:]) == text
    assert len(made[0]) == i + 1 and made[0].dtype == smallest(tokenizer_of.size)


def test_sources_name_files_and_the_card_counts(corpus: Jsonl, tmp_path: Path) -> None:
    store = build(corpus, Bytes(), tmp_path / "store")
    every = list(corpus)
    assert [store.source(i) for i in range(len(store))] == [name for name, _ in every]
    lengths = [len(text) + 1 for _, text in every]
    card = store.card
    assert (card["documents"], card["sources"], card["duplicates"]) == (200, 2, 30)
    assert (card["tokens"], card["bytes"]) == (sum(lengths), sum(lengths) - 200)
    assert card["length_percentiles"] == {str(p): int(np.percentile(lengths, p)) for p in (1, 10, 50, 90, 99, 100)}
    for bar in card["lengths"]:
        inside = [length for length in lengths if bar["from"] <= length < 2 * bar["from"]]
        assert (bar["documents"], bar["tokens"]) == (len(inside), sum(inside))
    assert sum(bar["tokens"] for bar in card["lengths"]) == sum(lengths)
    assert (store.folder / "lengths.png").exists()


class Cut(Jsonl):
    """Ends with an interrupt in its part `at`, and keeps count of the parts that are read."""

    at = -1
    read_parts: list[Any] = []

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        if len(self.read_parts) == self.at:
            raise KeyboardInterrupt
        self.read_parts.append(part.what)
        yield from super().read(part, skipped)


@pytest.mark.parametrize("at", [0, 1, 5, PARTS - 1])
def test_an_interrupted_one_goes_on_and_reads_no_part_twice(
    corpus: Jsonl, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(corpus, Bytes(), tmp_path / "whole")
    monkeypatch.setattr(Cut, "read_parts", [])
    monkeypatch.setattr(Cut, "at", at)
    with pytest.raises(KeyboardInterrupt):
        build(Cut(path=corpus.path), Bytes(), tmp_path / "store")
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(Cut, "at", -1)
    store = build(Cut(path=corpus.path), Bytes(), tmp_path / "store")
    assert content(store) == content(whole)
    assert Cut.read_parts == [part.what for part in corpus.parts()]
    assert not (tmp_path / ".store.partial").exists()


def test_a_bpe_is_trained_once_whatever_interrupts(
    corpus: Jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    whole = build(corpus, Untrained(300), tmp_path / "whole")
    monkeypatch.setattr(Cut, "read_parts", [])
    monkeypatch.setattr(Cut, "at", len(list(corpus.parts())) + 3)  # the sample reads every part
    with pytest.raises(KeyboardInterrupt):
        build(Cut(path=corpus.path), Untrained(300), tmp_path / "store")
    monkeypatch.setattr(Cut, "at", -1)
    monkeypatch.setattr(Untrained, "trained", None)
    assert content(build(Cut(path=corpus.path), Untrained(300), tmp_path / "store")) == content(whole)


def test_what_was_begun_of_another_corpus_is_not_gone_on_with(corpus: Jsonl, tmp_path: Path) -> None:
    Cut.at, Cut.read_parts = 3, []
    with pytest.raises(KeyboardInterrupt):
        build(Cut(path=corpus.path), Bytes(), tmp_path / "store")
    Cut.at = -1
    texts = write(tmp_path / "texts", [b"other", b"texts"])
    store = build(Text(path=str(texts)), Bytes(), tmp_path / "store")
    assert content(store) == content(build(Text(path=str(texts)), Bytes(), tmp_path / "clean"))


@pytest.mark.parametrize("name", ["tokens.bin", "hashes.npy", "journal.json", "parts/000005.bin", "parts/000005.npy"])
def test_a_machine_that_lost_its_power_is_no_harm(corpus: Jsonl, tmp_path: Path, name: str) -> None:
    """Files that were named and never reached the disk: what is left of them is empty."""
    whole = build(corpus, Bytes(), tmp_path / "whole")
    Cut.at, Cut.read_parts = 7, []
    with pytest.raises(KeyboardInterrupt):
        build(Cut(path=corpus.path), Bytes(), tmp_path / "store", runner=_all_then_merge)
    Cut.at = -1
    path = tmp_path / ".store.partial" / name
    assert path.exists() or name == "journal.json"
    path.write_bytes(b"")
    assert content(build(corpus, Bytes(), tmp_path / "store")) == content(whole)


def _all_then_merge(job, parts) -> Iterator[int]:
    """Finishes parts ahead of those that are put together, as many processes do."""
    waiting = []
    for number, part in parts:
        waiting.append(job(number, part))
        if len(waiting) > 3:
            yield waiting.pop(0)
    yield from waiting


def _killed(path: str, folder: Path) -> None:
    files.PART_BYTES = records.PART_BYTES = 4000
    merge.JOURNAL_S = 0.0
    os.setsid()

    def watch(progress: PrepareProgress) -> None:
        if progress.parts == 4:
            time.sleep(0.3)  # others are under way
            os.kill(os.getpid(), signal.SIGKILL)

    build(Jsonl(path=path), Bytes(), folder, runner=Processes(2), watch=watch)


def test_killed_without_warning_it_goes_on_and_leaves_no_process(corpus: Jsonl, tmp_path: Path) -> None:
    whole = build(corpus, Bytes(), tmp_path / "whole")
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(corpus.path, tmp_path / "store"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    begun = json.loads((tmp_path / ".store.partial" / "journal.json").read_text())["parts"]
    seen: list[int] = []
    store = build(corpus, Bytes(), tmp_path / "store", watch=lambda progress: seen.append(progress.parts))
    assert content(store) == content(whole)
    assert begun >= 3 and seen[0] == begun + 1 and seen[-1] == len(list(corpus.parts()))
    for _ in range(100):
        if not _of_session(process.pid):
            return
        time.sleep(0.1)
    raise AssertionError("processes that outlive whom they work for")


def _of_session(session: int | None) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def _on_a_full_disk(path: str, folder: Path, size: int, said, workers: int) -> None:
    files.PART_BYTES = records.PART_BYTES = 4000
    prepare.SMALL_BYTES, merge.JOURNAL_S = 0, 0.0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # the kernel refuses to write more: as a full disk does
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        build(Jsonl(path=path), Bytes(), folder, workers=workers)
        said.put("done")
    except ValueError as error:
        said.put(str(error))


@pytest.mark.parametrize(("size", "workers"), [(5_000, 1), (5_000, 2), (40_000, 1), (100_000, 1)])
def test_a_full_disk_is_one_line_and_the_next_call_goes_on(
    corpus: Jsonl, tmp_path: Path, size: int, workers: int
) -> None:
    whole = build(corpus, Bytes(), tmp_path / "whole")
    assert (whole.folder / "tokens.bin").stat().st_size > size
    spawn = multiprocessing.get_context("spawn")
    said = spawn.SimpleQueue()
    process = spawn.Process(target=_on_a_full_disk, args=(corpus.path, tmp_path / "store", size, said, workers))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    line = said.get()
    assert line.startswith(f"data.store={tmp_path}/store: the disk is full") and "\n" not in line
    assert not (tmp_path / "store").exists()
    assert content(build(corpus, Bytes(), tmp_path / "store")) == content(whole)


def test_a_bad_line_ends_all_processes_with_its_place(corpus: Jsonl, tmp_path: Path) -> None:
    with open(tmp_path / "b.jsonl", "a") as stream:
        stream.write("{no json\n")
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"b\.jsonl line 51 is not JSON"):
            build(Jsonl(path=corpus.path), Bytes(), tmp_path / "store", workers=workers)
        assert not (tmp_path / "store").exists()
        assert not [child for child in multiprocessing.active_children() if "Spawn" in type(child).__name__]
    store = build(Jsonl(path=corpus.path, on_error="skip"), Bytes(), tmp_path / "store", workers=2)
    assert store.card["skipped"] == {"not JSON": 1} and len(store) == 200


def _dying(job, parts) -> Iterator[int]:
    yield from Processes(2)(_Dying(), parts)


class _Dying:
    def __call__(self, number: int, part: CorpusPart) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number


def test_a_process_that_is_killed_is_one_line(corpus: Jsonl, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.workers: one was killed"):
        build(corpus, Bytes(), tmp_path / "store", runner=_dying)


def test_a_token_out_of_range_is_refused(corpus: Jsonl, tmp_path: Path) -> None:
    class Large(Bytes):
        def encode(self, content: bytes) -> Any:
            return super().encode(content) + np.uint16(200)

    with pytest.raises(ValueError, match=r"^data\.tokenizer: the corpus has token [0-9]+, out of its 257"):
        build(corpus, Large(), tmp_path / "store")


def test_nothing_that_grows_with_the_corpus_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest array that the preparing process makes is that of a part or a block, not of the corpus."""
    import tracemalloc

    for module in (prepare.card, merge):
        monkeypatch.setattr(module, "BLOCK", 256)
    monkeypatch.setattr(prepare.card, "HASHES", 512)
    monkeypatch.setattr(prepare.card, "draw", lambda *_: (tmp_path / "store").parent)
    peaks = []
    monkeypatch.setattr(merge, "JOURNAL_S", 5.0)
    for count in (1_500, 9_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(count)))
        corpus = Jsonl(path=str(path))
        build(corpus, Bytes(), tmp_path / f"warm-{count}")
        tracemalloc.start()
        build(corpus, Bytes(), tmp_path / f"store-{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks


def test_a_source_in_another_encoding_is_left_out_where_tokens_are_text(tmp_path: Path) -> None:
    root = tmp_path / "lib"
    root.mkdir()
    (root / "ours.py").write_bytes(b"x = 1\n" * 40)
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    corpus = Stdlib()
    corpus.root = root
    as_bytes = build(corpus, Bytes(), tmp_path / "bytes")
    assert as_bytes.card["documents"] == 2 and as_bytes.card["skipped"] == {}
    as_text = build(corpus, Untrained(260), tmp_path / "bpe")
    assert as_text.card["documents"] == 1 and as_text.card["skipped"] == {"not text": 1}


def test_ids_are_no_tokenizer_of_text(corpus: Jsonl, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer=ids"):
        build(corpus, Given(300, 0), tmp_path / "store")


if sys.platform != "linux":
    pytest.skip("processes are looked up in /proc", allow_module_level=True)
