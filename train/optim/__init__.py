"""Optimizers: which parameters get which step, the steps that torch does not have, clipping, and averages.

HOMES: the module of each class that a configuration names as `train.optim.NAME`.
"""

from importlib import import_module
from typing import Any

HOMES = {"AdamW": "train.optim.adamw", "CompactAdamW": "train.optim.compact_adamw", "Muon": "train.optim.muon"}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
