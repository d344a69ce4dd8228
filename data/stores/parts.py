"""The parts of a corpus, made into tokens one by one, by this process or by many.

A part is finished when NNNNNN.json stands beside its tokens (NNNNNN.bin) and its documents (NNNNNN.npy, `DOCUMENTS`):
it is written last, by renaming. What a part becomes depends on the corpus and the tokenizer alone, so it does not
matter who makes it, nor when; nothing but the batch at work is ever in memory.
"""

import errno
import io
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import reading
from data.corpora.corpus import Corpus
from data.corpora.files import CorpusPart, hashed
from data.roles import roles_of
from data.stores.indexed import smallest
from data.unknown import unknown as unknown_of

DOCUMENTS = np.dtype([("hash", "<u8"), ("length", "<i8"), ("source", "<u4")])
BATCH_BYTES = 1 << 18  # of text, tokenised at a time
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PartLostError(ValueError):
    """A process was lost that made a part: what is made already is kept, and the next call goes on."""


@dataclass(frozen=True)
class TokenizeJob:
    """The task that every part shares. tokens: the type of a corpus that is tokenised already; its tokens are not
    written."""

    corpus: Corpus
    tokenizer: Any
    folder: Path
    tokens: np.dtype | None = None

    def __call__(self, number: int, part: CorpusPart) -> int:
        """Makes a part, unless it is finished, and returns its number. Raises ValueError for a bad document."""
        if self.finished(number) is not None:
            return number
        place = self.folder / f"{number:06}"
        for kind in (".json", ".npy", ".bin", ".partial"):  # a link that was put there would be written through
            place.with_suffix(kind).unlink(missing_ok=True)
        skipped: Counter[str] = Counter()
        tables: list[NDArray[Any]] = []
        names: list[str] = []
        size = unknown = 0
        largest = -1
        roles = roles_of(self.tokenizer)
        before, behind = ((), ()) if self.tokens is not None else (roles.begin, roles.closing)
        opening, closing = (np.array(ids, dtype=self.dtype) for ids in (before, behind))
        with open(place.with_suffix(".bin"), "wb") as stream:
            for batch in _batched(self._documents(part, skipped)):
                contents = [content for _, content in batch]
                pieces, documents = [], []
                try:
                    every = list(self._encoded(contents))
                except ValueError as error:
                    raise ValueError(f"data.tokenizer: {error}") from None
                unknown += unknown_of(self.tokenizer, contents, every) if self.tokens is None else 0
                for (name, content), ids in zip(batch, every, strict=True):
                    if not len(ids) + len(opening):  # nothing of it is spelled, and nothing says that it begins
                        skipped["without a token"] += 1
                        continue
                    if not names or names[-1] != name:
                        names.append(name)
                    pieces += [opening, ids, closing]
                    documents.append((hashed(content), len(opening) + len(ids) + len(closing), len(names) - 1))
                    size += len(content)
                if not documents:
                    continue
                tables.append(np.array(documents, dtype=DOCUMENTS))
                together = np.concatenate(pieces)
                largest = max(largest, self._largest(together))
                if self.tokens is None:
                    stream.write(together.astype(self.dtype, copy=False).data)
        table = io.BytesIO()  # np.save to a file loses the reason why it could not be written
        np.save(table, np.concatenate([*tables, np.zeros(0, DOCUMENTS)]))
        place.with_suffix(".npy").write_bytes(table.getvalue())
        facts = {"bytes": size, "largest": largest, "skipped": dict(skipped), "names": names, "unknown": unknown}
        aside = place.with_suffix(".partial")
        aside.write_text(json.dumps(facts))
        aside.replace(place.with_suffix(".json"))
        return number

    def finished(self, number: int) -> dict[str, Any] | None:
        """Reads the facts of a finished part, its `documents` among them; None for one that is not whole.

        A machine that lost its power may have kept the name of a file and not its content.
        """
        place = self.folder / f"{number:06}"
        try:
            facts = reading.json_object(place.with_suffix(".json"))
            with reading.opened(place.with_suffix(".npy")) as file:
                documents = np.lib.format.read_array(file, allow_pickle=False)  # not np.load, which opens archives too
            written = place.with_suffix(".bin").stat().st_size
        except (OSError, ValueError, EOFError, MemoryError):
            return None
        kinds = {"bytes": int, "largest": int, "skipped": dict, "names": list}
        if documents.dtype != DOCUMENTS or not all(isinstance(facts.get(key), kind) for key, kind in kinds.items()):
            return None
        tokens = int(documents["length"].sum()) if self.tokens is None else 0
        return {**facts, "documents": documents} if written == tokens * self.dtype.itemsize else None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the tokens."""
        return smallest(self.tokenizer.size) if self.tokens is None else self.tokens

    def _documents(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """Reads a part's documents, leaving out those that are no text where the tokenizer spells nothing else."""
        for name, content in self.corpus.read(part, skipped):
            if self.tokens is None and not self.tokenizer.spells(content):
                skipped["not text"] += 1
            else:
                yield name, content

    def _encoded(self, contents: list[bytes]) -> Iterable[NDArray[np.integer]]:
        if self.tokens is None:
            return self.tokenizer.encode_batch(contents)
        return (np.frombuffer(content, dtype=self.tokens) for content in contents)

    def _largest(self, ids: NDArray[np.integer]) -> int:
        low, high, size = int(ids.min()), int(ids.max()), self.tokenizer.size
        if low < 0 or size and high >= size:
            raise ValueError(f"data.tokenizer: the corpus has token {low if low < 0 else high}, out of its {size:,}")
        return high


def _batched(documents: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    batch: list[tuple[str, bytes]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# Runs a job on (number, part) pairs, and yields the numbers in their order as the parts are finished.
Runner = Callable[[TokenizeJob, Iterable[tuple[int, CorpusPart]]], Iterator[int]]


def here(job: TokenizeJob, parts: Iterable[tuple[int, CorpusPart]]) -> Iterator[int]:
    """A runner: in this process, one after another."""
    for number, part in parts:
        yield job(number, part)


@dataclass(frozen=True)
class Processes:
    """A runner: over processes of this machine, which end with it. At most two parts a process are under way."""

    workers: int

    def __call__(self, job: TokenizeJob, parts: Iterable[tuple[int, CorpusPart]]) -> Iterator[int]:
        spawn = multiprocessing.get_context("spawn")
        before = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=_start, initargs=(job, os.getpid()))
        clean = False
        try:
            yield from in_order(lambda number, part: pool.submit(_work, number, part).result, parts, 2 * self.workers)
            clean = True
        except BrokenProcessPool:
            raise PartLostError("data.workers: one was killed, for its memory perhaps; fewer need less") from None
        finally:
            if not clean:  # else it would wait for what is under way
                for process in (ours := set(multiprocessing.active_children()) - before):
                    process.terminate()
                for process in ours:
                    process.join()
            pool.shutdown(wait=clean, cancel_futures=True)


def in_order(
    submit: Callable[[int, CorpusPart], Callable[[], int]], parts: Iterable[tuple[int, CorpusPart]], ahead: int
) -> Iterator[int]:
    """The results of what `submit` returns, in the order of the parts; `ahead` of them are under way at a time."""
    waiting: deque[Callable[[], int]] = deque()
    for number, part in parts:
        waiting.append(submit(number, part))
        if len(waiting) >= ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


_job: TokenizeJob | None = None


def _start(job: TokenizeJob, parent: int) -> None:
    """A process begins: Ctrl-C is its parent's, it has one core, and it does not outlive whom it works for."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(number: int, part: CorpusPart) -> int:
    assert _job is not None
    return _job(number, part)
