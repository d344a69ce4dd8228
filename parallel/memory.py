"""Activation checkpointing: keep a block's input, compute the rest again in the backward pass."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

RECOMPUTE = ("none", "full")


def recompute(model: nn.Module, layers: nn.ModuleDict, policy: str) -> None:
    """Wraps every layer (policy "full") or none. Collectives are repeated in the same order on every rank."""
    if policy not in RECOMPUTE:
        raise ValueError(f"engine.recompute={policy}: must be one of {', '.join(RECOMPUTE)}")
    if policy == "full":
        for name, layer in layers.items():
            layers[name] = checkpoint_wrapper(layer)
