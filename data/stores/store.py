"""The token store: a tokenised corpus on disk, complete or absent.

    tokens.bin       [tokens]         every document as its begin, its tokens and its end (`data.roles`), and
    tokens.idx                        its index: together an IndexedDataset of Megatron-core (`data.stores.indexed`)
    offsets.npy      int64 [N + 1]    document i is tokens[offsets[i]:offsets[i + 1]]
    hashes.npy       uint64 [N]       first 8 bytes of the sha256 of each document's content
    sources.npy      uint32 [N]       the line of sources.txt, from 0, that names where it comes from
    tokenizer.json                    the tokenizer's card (`data.tokenizer.from_card`)
    checksums.json                    of each file, the crc32 of every 64 MiB (`data.stores.checks`)
    card.json                         counts, length percentiles, the corpus' identity, the fingerprint, files' sizes
    lengths.png                       a histogram of the documents' lengths

All little-endian. Tokens are uint16, or int32 for a vocabulary of 65,500 and more. Of a corpus in Megatron's format the
tokens stay where they are, and the card says where (`at`); its documents are as they are there.

A store is made in a hidden folder beside its place, where an interrupted one goes on, and renamed into it.
"""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import reading
from data.corpora.corpus import Corpus
from data.roles import roles_of
from data.stores import prepare
from data.stores.checks import checked_card
from data.stores.indexed import TokenIndex
from data.stores.parts import NO_ROOM, PartLostError, Runner
from data.stores.prepare import FILES, PICTURE, VERSION, Watch
from data.tokenizer import from_card

OURS = frozenset({*FILES, PICTURE, "card.json"})


class Store:
    """A complete store, opened memory-mapped and read-only.

    Attributes: `tokens` [tokens] of an integer type, `offsets` int64 [N + 1], `hashes` uint64 [N], `sources` uint32
    [N], `card` (the parsed card.json), `tokenizer`, `fingerprint` (hex sha256 over the tokens and the offsets),
    `opened` (whether every document opens with the token that closes the one before it: where not, the last token of a
    document is followed by the next document's first, which nothing can predict). Raises ValueError if the folder holds
    no complete store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.card = checked_card(reading.json_object(self.folder / "card.json"))
            if self.card["version"] != VERSION:
                raise ValueError(f"of version {self.card['version']}, expected {VERSION}")
            for name, size in self.card["files"].items():
                if (size_on_disk := regular(self.folder / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {size_on_disk:,} bytes, its card says {size:,}")
            self.fingerprint: str = self.card["fingerprint"]
            prefix = self.card.get("at") or str(self.folder / "tokens")
            self.dtype = TokenIndex(regular(Path(f"{prefix}.idx"))).dtype
            self.tokens: NDArray[np.integer] = np.memmap(regular(Path(f"{prefix}.bin")), dtype=self.dtype, mode="r")
            self.offsets: NDArray[np.int64] = column(self.folder / "offsets.npy", "<i8")
            self.hashes: NDArray[np.uint64] = column(self.folder / "hashes.npy", "<u8")
            self.sources: NDArray[np.uint32] = column(self.folder / "sources.npy", "<u4")
            self.tokenizer: Any = from_card(reading.json_object(self.folder / "tokenizer.json"))
            self.opened = "at" not in self.card and roles_of(self.tokenizer).joint
            sizes = {"tokens": len(self.tokens), "documents": len(self.hashes)}
            whole = len(self.offsets) == len(self) + 1 and len(self.sources) == len(self)
            whole = whole and self.offsets[0] == 0 and self.offsets[-1] == len(self.tokens)
            if {key: self.card[key] for key in sizes} != sizes or not whole:
                raise ValueError("its files disagree with its card")
        except Exception as error:  # of a damaged file, numpy and a tokenizer raise whatever they come to
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"data.store={folder}: not a complete token store ({why})") from error

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.hashes)

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.folder,)  # else pickling would copy every token

    def document(self, index: int) -> NDArray[np.integer]:
        """Document `index`: its begin, its tokens and its end; [length]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def source(self, index: int) -> str:
        """The name of where document `index` comes from: a file of the corpus. Reads sources.txt up to there."""
        wanted = int(self.sources[index])
        with open(self.folder / "sources.txt", encoding="utf-8") as lines:
            return next(line for number, line in enumerate(lines) if number == wanted).rstrip("\n")


def column(path: Path, dtype: str) -> Any:
    """The array of one axis in an .npy file, mapped. Raises ValueError, without a key, for anything else."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # not np.load, which opens archives too
    except Exception as error:  # of a damaged header, numpy raises whatever it comes to
        raise ValueError(f"{path.name} is damaged ({' '.join(str(error).split())[:200]})") from None
    if array.ndim != 1 or array.dtype != np.dtype(dtype):
        raise ValueError(f"{path.name} holds {array.dtype} of {array.ndim} axes")
    return array


def regular(path: Path) -> Path:
    """The path, of a regular file: of a device or a pipe there may be no end. Raises OSError, ValueError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path.name} is no regular file")
    return path


def build(
    corpus: Corpus,
    tokenizer: Any,
    folder: str | Path,
    *,
    identity: dict[str, Any] | None = None,
    workers: int = 1,
    runner: Runner | None = None,
    watch: Watch | None = None,
) -> Store:
    """The store of `corpus` in `folder`: the one that is there if it is of the same identity, else a new one.

    identity: that of the corpus, where it has been asked already: a corpus looks at each of its files for it.

    Its bytes do not depend on workers or runner (`prepare.fill`). Processes that build the same folder at once all end
    with a good store. Raises ValueError if the folder holds anything that is not a store's, if the corpus has no
    documents or a bad one, if the folder cannot be written, or if the disk is full: then, as after an interrupt, the
    next call goes on.
    """
    folder = Path(folder).absolute()
    source = {"identity": identity or corpus.identity(), "tokenizer": tokenizer.identity}
    if (store := _reusable(folder, source)) is not None:
        return store
    if folder.exists() and not (folder.is_dir() and OURS.issuperset(os.listdir(folder))):
        raise ValueError(f"data.store={folder}: holds other files; expected a new folder, or a token store to replace")
    ground = next(parent for parent in folder.parents if parent.exists())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder) as alone_here, _room(folder, keep=alone_here) as new:
            if (store := _reusable(folder, source)) is not None:  # built by another process while this one waited
                return store
            try:
                prepare.fill(new, corpus, tokenizer, source, workers=workers, runner=runner, watch=watch)
            except PartLostError:
                raise
            except ValueError:  # refused: the next call reads other files, or these anew
                shutil.rmtree(new, ignore_errors=True)
                raise
            for path in (*new.iterdir(), new):
                sync(path)
            if not _put(new, folder, source):
                shutil.rmtree(new)
            sync(folder.parent)
    except OSError as error:
        if error.errno not in NO_ROOM:
            at = f": {error.filename}" if error.filename else ""
            raise ValueError(f"data.store={folder}: cannot be written ({error.strerror}{at})") from None
        raise ValueError(
            f"data.store={folder}: the disk is full ({error.strerror}); with more room, the same command goes on"
        ) from None
    finally:
        for parent in folder.parents:
            if parent == ground:
                break
            with suppress(OSError):  # something is there
                parent.rmdir()
    return Store(folder)


def _reusable(folder: Path, source: dict[str, Any]) -> Store | None:
    try:
        store = Store(folder)
    except ValueError:
        return None
    return store if {key: store.card.get(key) for key in source} == source else None


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """One maker of `folder` at a time, where the file system has locks; whether it has. Leaves no file."""
    path = folder.parent / f".{folder.name}.lock"
    while True:
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                yield False
                return
            if not _is(lock, path):  # removed by whom this one has waited for
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is(opened: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _room(folder: Path, keep: bool) -> Iterator[Path]:
    """A folder to make a store in: always the same one, so that it can be gone on with, unless others may be in it."""
    if keep:
        yield folder.parent / f".{folder.name}.partial"
        return
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
        yield Path(aside, "new")


def _put(new: Path, folder: Path, source: dict[str, Any]) -> bool:
    """Renames a finished store into its place. False where a rival's is there, which is as good."""
    try:
        new.rename(folder)
    except OSError:  # something is there: a store of another corpus, half a store, or a rival's where locks fail
        if _reusable(folder, source) is not None:
            return False
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
            folder.rename(Path(aside, "old"))
            new.rename(folder)
    return True


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
