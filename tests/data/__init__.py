"""Tests of data/, on small corpora made on the spot."""

import random
from pathlib import Path

from data.corpora.corpus import Text
from data.stores.store import Store, build
from data.tokenizer import Bytes


def write(folder: Path, contents: list[bytes]) -> Path:
    """A folder of text files 000.txt, 001.txt, … of the given contents."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(contents):
        (folder / f"{i:03}.txt").write_bytes(content)
    return folder


def prose(count: int, longest: int, seed: int = 0) -> list[bytes]:
    """Different documents of 1 to `longest` bytes over a small alphabet."""
    draw = random.Random(seed)
    contents: dict[bytes, None] = {}
    while len(contents) < count:
        contents[bytes(draw.choices(b"abcde \n", k=draw.randint(1, longest)))] = None
    return list(contents)


def store_of(folder: Path, contents: list[bytes]) -> Store:
    """A store of the given documents, in their order."""
    return build(Text(path=str(write(folder / "texts", contents))), Bytes(), folder / "store")
