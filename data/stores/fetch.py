"""A store on shared or object storage, copied to this machine's own disk: once, whoever asks for it.

The copy goes shard by shard and hashes what it copies, so it ends with the store's fingerprint or not at all; cut
short, it goes on behind its last whole shard.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.stores.checks import checked_card
from data.stores.parts import NO_ROOM
from data.stores.prepare import PICTURE
from data.stores.store import Store, alone, column, regular, sync

SHARD_BYTES = 64 << 20


class StoreAddress:
    """A folder to read from: a path, or an address that fsspec understands (s3://…, gs://…).

    Raises ValueError, one line that opens with the key, where it does not answer.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.remote: Any = None
        self.root = address
        if is_address(address):
            try:
                from fsspec.core import url_to_fs
            except ImportError:
                raise ValueError(f"data.store={address}: needs fsspec, which is not installed") from None
            try:
                self.remote, self.root = url_to_fs(address)
            except (ImportError, ValueError) as error:
                raise ValueError(f"data.store={address}: {' '.join(str(error).split())[:200]}") from None

    def card(self) -> dict[str, Any]:
        """The store's card. Raises ValueError where there is none."""
        try:
            return checked_card(json.loads(self.read("card.json", 0, None)))
        except Exception as error:  # what a file system on a network raises is its own
            line = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"data.store={self.address}: not a complete token store ({line})") from None

    def read(self, name: str, begin: int, end: int | None) -> bytes:
        """Bytes begin..end of a file; to its end where that is null."""
        if self.remote is not None:
            return self.remote.cat_file(str(PurePosixPath(self.root, name)), start=begin, end=end)
        with open(regular(Path(self.root).expanduser() / name), "rb") as stream:
            stream.seek(begin)
            return stream.read(-1 if end is None else end - begin)


def is_address(store: str) -> bool:
    """True for a store named by an address, not by a path."""
    return "://" in store


def fetch(store: str, local: str | Path) -> Path:
    """The folder, below `local`, of a copy of `store`: the one that is there, or a new one.

    Processes of this machine that ask at once wait for the one that copies. Raises ValueError for a store that is not
    complete or not as its card says, and for a full disk: then the next call goes on.
    """
    place = StoreAddress(store)
    card = place.card()
    if "at" in card:
        raise ValueError(f"data.local={local}: a Megatron corpus is used where it lies ({card['at']}); must be null")
    name = PurePosixPath(place.root).name
    folder = Path(local).expanduser().absolute() / f"{name}-{str(card.get('fingerprint'))[:12]}"
    if _is_copy(folder, card):
        return folder
    aside = folder.parent / f".{folder.name}.partial"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if _is_copy(folder, card):
                return folder
            try:
                _copy(place, card, aside)
            except ValueError:  # refused: nothing of it is gone on with
                shutil.rmtree(aside, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            sync(folder.parent)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise ValueError(
                f"data.local={local}: the disk is full; with more room, the same command goes on"
            ) from None
        raise ValueError(f"data.local={local}: {store} cannot be copied ({error})") from None
    return folder


def _is_copy(folder: Path, card: dict[str, Any]) -> bool:
    try:
        return Store(folder).fingerprint == card["fingerprint"]
    except ValueError:
        return False


def _copy(place: StoreAddress, card: dict[str, Any], aside: Path) -> None:
    """Every file of the store; the card last. Raises ValueError unless tokens and offsets have its fingerprint."""
    digest = hashlib.sha256()
    sizes = dict(sorted(card["files"].items(), key=lambda file: file[0] != "tokens.bin"))  # their order in the digest
    for name, size in sizes.items():
        with open(aside / name, "a+b") as stream:
            have = min(stream.seek(0, os.SEEK_END), size) // SHARD_BYTES * SHARD_BYTES
            stream.truncate(have)
            stream.seek(0)
            while name == "tokens.bin" and stream.tell() < have:
                digest.update(stream.read(min(SHARD_BYTES, have - stream.tell())))
            for begin in range(have, size, SHARD_BYTES):
                shard = place.read(name, begin, min(begin + SHARD_BYTES, size))
                if len(shard) != min(SHARD_BYTES, size - begin):
                    raise ValueError(f"data.store={place.address}: {name} is shorter than its card says: truncated")
                stream.write(shard)
                if name == "tokens.bin":
                    digest.update(shard)
            stream.flush()
            os.fsync(stream.fileno())
    try:
        digest.update(np.ascontiguousarray(column(aside / "offsets.npy", "<i8")).data)
    except ValueError as error:
        raise ValueError(f"data.store={place.address}: {error}") from None
    if digest.hexdigest() != card["fingerprint"]:
        shutil.rmtree(aside)
        raise ValueError(f"data.store={place.address}: its tokens are not those that its card was made of")
    try:
        (aside / PICTURE).write_bytes(place.read(PICTURE, 0, None))
    except Exception:  # a picture is not worth a run
        (aside / PICTURE).unlink(missing_ok=True)
    (aside / "card.json").write_text(json.dumps(card, indent=2) + "\n")
