"""Checks of a store against its writer's record: a checksum of every part of its files, offsets that ascend, tokens in
range.

`checksums.json` has, of each file, the crc32 of every `PART_BYTES` of it: as in gzip, zip and Parquet, against disks
and copies, not against people. A store that was made before there were any has its fingerprint alone.
"""

import hashlib
import json
import random
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import reading

CHECKSUMS = "checksums.json"
PART_BYTES = 64 << 20
BLOCK_BYTES = 1 << 20  # read at a time
START_S = 5.0  # that the start of a run takes for it
NEEDED = frozenset({"offsets.npy", "hashes.npy", "sources.npy", "sources.txt", "tokenizer.json"})
TOKENS = "tokens.bin"
COUNTS = ("documents", "duplicates", "tokens", "bytes", "sources", "vocabulary")


class BlockChecksums:
    """The crc32 of every `PART_BYTES` of what is given block by block."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._size = 0

    def update(self, block: Any) -> None:
        view = memoryview(block).cast("B")
        while view:
            room = PART_BYTES - self._size % PART_BYTES
            if room == PART_BYTES:
                self._sums.append(0)
            self._sums[-1] = zlib.crc32(view[:room], self._sums[-1])
            self._size += len(view[:room])
            view = view[room:]

    def values(self) -> list[int]:
        return list(self._sums)


def write(folder: Path, names: list[str], tokens: BlockChecksums) -> None:
    """Writes the checksums of a store's files: those of its tokens as they were given, wherever those lie."""
    files = {TOKENS: tokens.values()}
    for name in names:
        if name not in (TOKENS, CHECKSUMS):
            sums = BlockChecksums()
            for block in _blocks(folder / name):
                sums.update(block)
            files[name] = sums.values()
    card = {"algorithm": "crc32", "part_bytes": PART_BYTES, "files": files}
    (folder / CHECKSUMS).write_text(json.dumps(card) + "\n")


def checked_card(card: Any) -> dict[str, Any]:
    """A card whose fields are of the types that every reader relies on. Raises ValueError, without a key."""
    if not isinstance(card, dict):
        raise ValueError("its card is no object")
    files = card.get("files")
    if not isinstance(files, dict) or not all(_is_count(size) for size in files.values()):
        raise ValueError("its card does not say how large its files are")
    if elsewhere := [name for name in files if Path(name).name != name or name in (".", "..")]:
        raise ValueError(f"its card names a file elsewhere ({elsewhere[0]})")
    tokens = set() if "at" in card else {TOKENS, "tokens.idx"}
    if missing := sorted({*NEEDED, *tokens} - files.keys()):
        raise ValueError(f"its card knows no {missing[0]}")
    for key in COUNTS:
        if not _is_count(card.get(key)):
            raise ValueError(f"its card has no number under {key}")
    for key in ("skipped", "length_percentiles"):
        if not isinstance(card.get(key), dict) or not all(map(_is_count, card[key].values())):
            raise ValueError(f"its card has no numbers under {key}")
    for key in ("fingerprint", "tokenizer", *(["at"] if "at" in card else [])):
        if not isinstance(card.get(key), str):
            raise ValueError(f"its card has no text under {key}")
    return card


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class FilePiece(NamedTuple):
    """Bytes begin..end of a file, and their crc32, None where it is not known."""

    name: str
    begin: int
    end: int
    sum: int | None


def verify(store: Any, seconds: float | None = None) -> tuple[int, int]:
    """Reads a store (`data.stores.store.Store`) and holds it against its checksums: (parts read, parts that it has).

    seconds: stops then, having read the small files first and parts of the tokens in random order; null reads all.
    Raises ValueError, one line that names the store, and the file and the part or the document, for what is damaged.
    """
    begun, at = time.monotonic(), f"data.store={store.folder}"
    pieces = _pieces(store, at)
    for done, piece in enumerate(pieces):
        if seconds is not None and time.monotonic() - begun > seconds:
            return done, len(pieces)
        _verify(store, piece, at)
    if not (store.folder / CHECKSUMS).exists():
        _fingerprint(store, at, None if seconds is None else begun + seconds)
    return len(pieces), len(pieces)


def _pieces(store: Any, at: str) -> list[FilePiece]:
    """Lists the pieces of the small files first, then those of the tokens, in random order."""
    step, known = PART_BYTES, {}
    if (path := store.folder / CHECKSUMS).exists():
        try:
            card = reading.json_object(path)
            step, known = card["part_bytes"], card["files"]
            right = type(step) is int and step > 0 and isinstance(known, dict)
            right = right and all(isinstance(sums, list) and all(map(_is_count, sums)) for sums in known.values())
        except (ValueError, KeyError):
            right = False
        if not right or TOKENS not in known:
            raise ValueError(f"{at}: {CHECKSUMS} is damaged{_way_out(store)}")
    parsed = []
    for name in sorted({*known, TOKENS, "offsets.npy"} - {CHECKSUMS}, key=lambda name: (name == TOKENS, name)):
        size, sums = _size(_path(store, name), at), known.get(name)
        begins = range(0, size, step)
        if sums is not None and len(sums) != len(begins):
            raise ValueError(f"{at}: {name} is not of the size that {CHECKSUMS} says{_way_out(store)}")
        parts = [FilePiece(name, b, min(b + step, size), sums[i] if sums else None) for i, b in enumerate(begins)]
        if name == TOKENS:
            random.shuffle(parts)
        parsed += parts
    return parsed


def _size(path: Path, at: str) -> int:
    """The bytes of a regular file: a device or a pipe may have no end. Raises ValueError."""
    try:
        facts = path.stat()
    except OSError as error:
        raise ValueError(f"{at}: {path.name} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{at}: {path.name} is no regular file")
    return facts.st_size


def _path(store: Any, name: str) -> Path:
    if Path(name).name != name or "\0" in name:
        raise ValueError(f"data.store={store.folder}: {CHECKSUMS} names a file elsewhere ({name})")
    return Path(f"{store.card['at']}.bin") if name == TOKENS and "at" in store.card else store.folder / name


def _verify(store: Any, piece: FilePiece, at: str) -> None:
    if piece.sum is not None:
        crc = 0
        for block in _blocks(_path(store, piece.name), piece.begin, piece.end):
            crc = zlib.crc32(block, crc)
        if crc != piece.sum:
            where = f"bytes {piece.begin:,} to {piece.end:,}"
            raise ValueError(f"{at}: {piece.name} is not what was written ({where} are damaged){_way_out(store)}")
    if piece.name == "offsets.npy":
        header = store.folder.joinpath(piece.name).stat().st_size - 8 * len(store.offsets)
        first = max((piece.begin - header) // 8, 0)
        offsets = np.asarray(store.offsets[max(first - 1, 0) : max((piece.end - header) // 8, 0)])
        if len(down := np.flatnonzero(np.diff(offsets) <= 0)):
            document = max(first - 1, 0) + int(down[0])
            raise ValueError(f"{at}: offsets.npy does not ascend at document {document}{_way_out(store)}")
    if piece.name == TOKENS:
        width = store.tokens.dtype.itemsize
        known(store, piece.begin // width, -(-piece.end // width), store.tokenizer.size)


def known(store: Any, begin: int, end: int, size: int) -> None:
    """Raises ValueError, which names store and document, where one of the tokens begin..end is not below `size`."""
    for first in range(begin, end, BLOCK_BYTES):
        tokens = store.tokens[first : min(first + BLOCK_BYTES, end)]
        if len(tokens) and (int(tokens.max()) >= size or int(tokens.min()) < 0):
            place = int(np.flatnonzero((tokens >= size) | (tokens < 0))[0])
            where = f"data.store={store.folder}: {_document(store, first + place)}"
            raise ValueError(f"{where} has token {int(tokens[place])}, out of the tokenizer's {size:,}")


def _document(store: Any, place: int) -> str:
    """The document that has a token, by the token's place in a store."""
    document = int(np.searchsorted(store.offsets, place, side="right")) - 1
    try:
        return f"document {document} ({store.source(document)})"
    except (OSError, ValueError, IndexError, StopIteration):
        return f"document {document}"


def _fingerprint(store: Any, at: str, until: float | None) -> None:
    """Checks the fingerprint of a store without checksums, as far as there is time. Raises ValueError for another
    one."""
    digest = hashlib.sha256()
    for block in _blocks(_path(store, TOKENS)):
        digest.update(block)
        if until is not None and time.monotonic() > until:
            return
    digest.update(np.ascontiguousarray(store.offsets).data)
    if digest.hexdigest() != store.fingerprint:
        raise ValueError(f"{at}: its tokens and offsets are not what was written{_way_out(store)}")


def _way_out(store: Any) -> str:
    return "; delete the folder, and farspan prepare makes it anew" if "at" not in store.card else ""


def _blocks(path: Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        stream.seek(begin)
        left = path.stat().st_size - begin if end is None else end - begin
        while left > 0 and (block := stream.read(min(BLOCK_BYTES, left))):
            left -= len(block)
            yield block
