"""Makes the files of a store from a corpus: tokens, index, sidecar and card, in a folder that can be gone on with.

Memory: this process holds a part's documents at a time (20 bytes each); every process that makes parts holds a batch
of `BATCH_BYTES` of text, its tokens, and the largest document. Neither grows with the corpus (a packed file of JSON
lines is one part). What does grow, and is small: names of files (of a folder), and the different lengths that documents
have.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import reading
from data.corpora.corpus import Corpus
from data.corpora.files import CorpusPart
from data.corpora.megatron import Megatron
from data.stores import card, checks
from data.stores.merge import JOURNAL, Merge
from data.stores.parts import PartLostError, Processes, Runner, TokenizeJob, here
from data.tokenizer import Given, Untrained, from_card

VERSION = 2
DATA = ("tokens.bin", "tokens.idx", "offsets.npy", "hashes.npy", "sources.npy", "sources.txt", "tokenizer.json")
FILES = (*DATA, checks.CHECKSUMS)
PICTURE = "lengths.png"
SAMPLE_BYTES = 32 << 20  # of text, that a BPE is trained on
SMALL_BYTES = 48 << 20  # of corpus, for which starting processes does not pay
_SAMPLED = 64  # places of the corpus that a sample comes from


class PrepareProgress(NamedTuple):
    """The progress of `prepare`. done, total: bytes of the corpus, as far as their number is known before they are
    read."""

    done: int
    total: int
    parts: int
    of: int
    documents: int
    tokens: int


Watch = Callable[[PrepareProgress], None]


def fill(
    folder: Path,
    corpus: Corpus,
    tokenizer: Any,
    source: dict[str, Any],
    *,
    workers: int = 1,
    runner: Runner | None = None,
    watch: Watch | None = None,
) -> None:
    """Makes the files of a store in `folder`, or goes on with what was begun there; the card is written last.

    source: the identities of corpus and tokenizer. workers: processes, where no runner says how. The files are the same
    whatever both are. Raises ValueError for a corpus that holds no documents, or a bad one.
    """
    parts = list(corpus.parts())
    _begin(folder, {**source, "version": VERSION, "parts": _digest(parts)})
    tokenizer = _tokenizer(folder, corpus, parts, tokenizer)
    tokens = corpus.index.dtype if isinstance(corpus, Megatron) else None
    job = TokenizeJob(corpus, tokenizer, folder / "parts", tokens)
    merge = _merge(folder, job, corpus.bin if isinstance(corpus, Megatron) else None)
    try:
        total = sum(part.size for part in parts)
        if runner is None:
            runner = Processes(min(workers, len(parts))) if workers > 1 and total > SMALL_BYTES else here
        first = merge.facts["parts"]
        done = sum(part.size for part in parts[:first])
        for number in runner(job, ((i, parts[i]) for i in range(first, len(parts)))):
            part = job.finished(number)
            if part is None:
                raise PartLostError(f"data.store: {job.folder} lost a part that was finished; is it on all machines?")
            merge.append(number, part)
            done += parts[number].size
            if watch is not None:
                facts = merge.facts
                watch(PrepareProgress(done, total, number + 1, len(parts), facts["documents"], facts["tokens"]))
        if not merge.facts["documents"]:
            raise corpus.nothing()
        merge.journal()
        fingerprint = merge.finish()
    except BaseException:
        merge.close()
        raise
    if isinstance(tokenizer, Given):
        tokenizer = tokenizer.fitted(merge.facts["largest"])
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer.card()) + "\n")
    checks.write(folder, [name for name in DATA if (folder / name).exists()], merge.sums)
    _card(folder, corpus, source, tokenizer, merge, fingerprint)
    shutil.rmtree(job.folder)
    (folder / JOURNAL).unlink()
    (folder / "plan.json").unlink()  # nothing is left to go on with


def _merge(folder: Path, job: TokenizeJob, tokens: Path | None) -> Merge:
    """Continues the merge; from the first part again where the disk has lost some of it."""
    try:
        return Merge(folder, job.folder, job.dtype, tokens)
    except (ValueError, KeyError, TypeError):
        (folder / JOURNAL).unlink()
        return Merge(folder, job.folder, job.dtype, tokens)


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Keeps what was begun under the same plan, and clears what was begun under another, or cannot be gone on with."""
    try:
        known = reading.json_object(folder / "plan.json") == plan
    except ValueError:
        known = False
    if not known:
        shutil.rmtree(folder, ignore_errors=True)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan))


def _digest(parts: list[CorpusPart]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _tokenizer(folder: Path, corpus: Corpus, parts: list[CorpusPart], tokenizer: Any) -> Any:
    """The tokenizer, trained if it has to be, and once only: its card is beside what it has been used for."""
    path = folder / "tokenizer.json"
    if isinstance(tokenizer, Untrained):
        if path.exists():
            try:
                return from_card(reading.json_object(path))
            except ValueError:
                pass  # cut short while it was written: nothing has been tokenised by it
        tokenizer = tokenizer.trained(_sample(corpus, parts))
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(tokenizer.card()) + "\n")
    aside.replace(path)
    return tokenizer


def _sample(corpus: Corpus, parts: list[CorpusPart]) -> Iterator[bytes]:
    """Documents from all over a corpus, `SAMPLE_BYTES` of them at most: the same whoever reads them."""
    step = max(len(parts) // _SAMPLED, 1)
    chosen = parts[::step][:_SAMPLED]
    for part in chosen:
        left = SAMPLE_BYTES // len(chosen)
        for _, content in corpus.read(part, Counter()):
            yield content[:left].decode(errors="ignore").encode()
            left -= len(content)
            if left <= 0:
                break


def _card(folder: Path, corpus: Corpus, source: dict[str, Any], tokenizer: Any, merge: Merge, fingerprint: str) -> None:
    offsets = np.load(folder / "offsets.npy", mmap_mode="r")
    lengths, counts = card.lengths_of(offsets)
    bars = card.histogram(lengths, counts)
    facts = merge.facts
    title = f"{facts['documents']:,} documents, {facts['tokens']:,} tokens"
    card.draw(bars, title, folder / PICTURE)
    elsewhere = {"at": str(corpus.prefix)} if isinstance(corpus, Megatron) else {}
    lines_of_card = {
        "version": VERSION,
        **source,
        **elsewhere,
        "vocabulary": tokenizer.size,
        "special": tokenizer.card()["special"],
        "documents": facts["documents"],
        "duplicates": card.duplicates(np.load(folder / "hashes.npy", mmap_mode="r")),
        "tokens": facts["tokens"],
        "bytes": facts["bytes"],
        "skipped": {**corpus.left_out(), **facts["skipped"]},
        "unknown": facts["unknown"],
        "sources": facts["names"],
        "length_percentiles": {str(p): card.percentile(lengths, counts, p) for p in card.PERCENTILES},
        "lengths": bars,
        "files": {name: (folder / name).stat().st_size for name in FILES if (folder / name).exists()},
        "fingerprint": fingerprint,
    }
    (folder / "card.json").write_text(json.dumps(lines_of_card, indent=2) + "\n")
