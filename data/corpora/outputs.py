"""Folders that farspan itself has written, or a library beside it: below a corpus, they are no part of it.

A run that reads `data.path=.` would else read its own configuration, and another text as soon as it has begun.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path

LOOKED = 1 << 20  # bytes of a configuration that are looked at
CACHES = (  # variables that name a cache of a library that a run uses
    *("XDG_CACHE_HOME", "MPLCONFIGDIR", "HF_HOME", "HF_DATASETS_CACHE", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR"),
    *("TRITON_CACHE_DIR", "WANDB_DIR", "WANDB_CACHE_DIR", "RAY_TMPDIR"),
)


def is_cache(folder: str | Path, names: Collection[str]) -> bool:
    """True for a folder of these entries that calls itself a cache (bford.info/cachedir), or that the environment names
    as one."""
    if "CACHEDIR.TAG" in names:
        return True
    base = os.path.basename(folder)
    known = (value.rstrip("/") for name in CACHES if (value := os.environ.get(name)))
    return any(os.path.basename(k) == base and os.path.realpath(k) == os.path.realpath(folder) for k in known)


def is_output(folder: Path, names: Collection[str]) -> bool:
    """True for a folder of these entries that is a run's or a checkpoint's, a sweep's, a token store, an index of one,
    or a model's in safetensors."""
    if "config.yaml" in names and _matches(folder / "config.yaml", rb"^model:", rb"^code:"):
        return True
    if "sweep.json" in names and _matches(folder / "sweep.json", rb'"members"'):
        return True
    if "card.json" in names and {"offsets.npy", "hashes.npy"} <= {*names}:
        return True
    if "index.json" in names and _matches(folder / "index.json", rb'^ "counts"', rb'^ "facts"'):
        return True
    return "config.json" in names and any(n.endswith((".safetensors", ".safetensors.index.json")) for n in names)


def _matches(file: Path, *patterns: bytes) -> bool:
    try:
        if not file.is_file():
            return False
        with file.open("rb") as stream:
            head = stream.read(LOOKED)
    except OSError:
        return False
    return all(re.search(pattern, head, re.MULTILINE) for pattern in patterns)


def is_inside(file: Path, root: Path) -> bool:
    """True where a folder between `root` and a file below it, `root` itself among them, is an output."""
    for folder in file.parents:
        try:
            names = [entry.name for entry in folder.iterdir()]
            if is_output(folder, names) or folder != root and is_cache(folder, names):
                return True
        except OSError:
            return False
        if folder == root:
            return False
    return False
