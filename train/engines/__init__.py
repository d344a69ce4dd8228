"""Engines: who shards the model and steps the optimizer.

HOMES: the module of each class that a configuration names as `train.engines.NAME`; importing all would import torch's
FSDP, two seconds long, into every launcher.
"""

from importlib import import_module
from typing import Any

HOMES = {
    "DeepSpeed": "train.engines.deepspeed",
    "FSDP": "train.engines.fsdp",
    "MegatronCore": "train.engines.megatron",
}
ENGINES = {"deepspeed": "DeepSpeed", "fsdp": "FSDP", "megatron": "MegatronCore"}  # the class of `engine=NAME`


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
