"""The computation of a model, as if one device held everything. Nothing here knows a rank or imports torch.distributed.

HOMES: the module of each class that a configuration names as `models.NAME`.
"""

from importlib import import_module
from typing import Any

HOMES = {
    "Block": "models.block",
    "ChannelMix": "models.ffn",
    "LM": "models.lm",
    "MLP": "models.ffn",
    "MoE": "models.moe",
    "SwiGLU": "models.ffn",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
