"""The tokens that a run trains on, as a pure function of (seed, step).

A corpus yields documents, a tokenizer makes ids of them, a store keeps the ids on disk, packing cuts windows from the
store, and the loader makes batches of windows. NumPy only: nothing here imports torch or another room of farspan.

HOMES: the module of each class that a configuration names as `data.NAME`.
"""

from importlib import import_module
from typing import Any

HOMES = {
    "Curriculum": "data.curriculum",
    "Data": "data.loader",
    "Mixture": "data.mixture",
    "Portion": "data.mixture",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
