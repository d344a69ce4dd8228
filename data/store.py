"""The token store: a tokenised corpus on disk, complete or absent.

    tokens.bin    uint16 [tokens]     every document as DOCUMENT and its tokens, end to end
    offsets.npy   int64 [N + 1]       document i is tokens[offsets[i]:offsets[i + 1]]
    hashes.npy    uint64 [N]          first 8 bytes of the sha256 of each document's content
    card.json                         counts, length percentiles, the corpus' identity, the fingerprint

All little-endian. A store is written in a folder beside its place, synced, and renamed into it.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.corpus import Corpus
from data.tokenizer import Bytes

VERSION = 1
FILES = frozenset({"tokens.bin", "offsets.npy", "hashes.npy", "card.json"})
PERCENTILES = (1, 10, 50, 90, 99, 100)


class Store:
    """A complete store, opened memory-mapped and read-only.

    Attributes: `tokens` uint16 [tokens], `offsets` int64 [N + 1], `hashes` uint64 [N], `card` (the parsed card.json),
    `fingerprint` (hex sha256 over the tokens and the offsets). Raises ValueError if the folder holds no complete store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.card: dict[str, Any] = json.loads((self.folder / "card.json").read_text())
            self.fingerprint: str = self.card["fingerprint"]
            self.tokens: NDArray[np.uint16] = np.memmap(self.folder / "tokens.bin", dtype="<u2", mode="r")
            self.offsets: NDArray[np.int64] = np.load(self.folder / "offsets.npy", mmap_mode="r")
            self.hashes: NDArray[np.uint64] = np.load(self.folder / "hashes.npy", mmap_mode="r")
            sizes = {"tokens": len(self.tokens), "documents": len(self.hashes), "version": VERSION}
            if {key: self.card[key] for key in sizes} != sizes or len(self.offsets) != len(self) + 1:
                raise ValueError("its files disagree with its card")
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise ValueError(f"data.store={folder}: not a complete token store ({error})") from error

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.hashes)

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.folder,)  # else pickling would copy every token

    def document(self, index: int) -> NDArray[np.uint16]:
        """Document `index`: DOCUMENT, then its tokens; uint16 [length]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def build(corpus: Corpus, tokenizer: Bytes, folder: str | Path) -> Store:
    """The store of `corpus` in `folder`: the one that is there if it is of the same identity, else a new one.

    Processes that build the same folder at once all end with a good store. Raises ValueError if the folder holds
    anything that is not a store's, or if the corpus has no documents.
    """
    folder = Path(folder).absolute()
    source = {"identity": corpus.identity(), "tokenizer": tokenizer.name}
    if (store := _reusable(folder, source)) is not None:
        return store
    if folder.exists() and not (folder.is_dir() and FILES.issuperset(os.listdir(folder))):
        raise ValueError(f"data.store={folder}: holds other files; expected a new folder, or a token store to replace")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
        if (store := _reusable(folder, source)) is not None:  # built by another process while this one waited
            return store
        new = Path(aside, "new")
        new.mkdir()
        _write(corpus, tokenizer, new, source)
        try:
            new.rename(folder)
        except OSError:  # something is there: a store of another corpus, half a store, or a rival's where locks fail
            if (store := _reusable(folder, source)) is not None:
                return store
            folder.rename(Path(aside, "old"))
            new.rename(folder)
        _sync(folder.parent)
    return Store(folder)


def _reusable(folder: Path, source: dict[str, Any]) -> Store | None:
    try:
        store = Store(folder)
    except ValueError:
        return None
    return store if {key: store.card.get(key) for key in source} == source else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One builder of `folder` at a time, where the file system has locks."""
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(corpus: Corpus, tokenizer: Bytes, folder: Path, source: dict[str, Any]) -> None:
    lengths, hashes, size, digest = [], [], 0, hashlib.sha256()
    opening = np.array([tokenizer.DOCUMENT], dtype="<u2")
    with open(folder / "tokens.bin", "wb") as stream:
        for _, content in corpus:
            document = np.concatenate([opening, tokenizer.encode(content)]).astype("<u2").tobytes()
            stream.write(document)
            digest.update(document)
            lengths.append(len(document) // opening.itemsize)
            hashes.append(int.from_bytes(hashlib.sha256(content).digest()[:8], "little"))
            size += len(content)
    if not lengths:
        raise ValueError(f"data.corpus={source['identity']['corpus']}: holds no documents")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    digest.update(offsets.tobytes())
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "hashes.npy", np.array(hashes, dtype="<u8"))
    card = {
        "version": VERSION,
        **source,
        "documents": len(lengths),
        "duplicates": len(hashes) - len(set(hashes)),
        "tokens": int(offsets[-1]),
        "bytes": size,
        "length_percentiles": {str(p): int(np.percentile(lengths, p)) for p in PERCENTILES},
        "fingerprint": digest.hexdigest(),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
