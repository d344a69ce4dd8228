"""How many targets a model names right: what tells mixers apart on a generated task, where a loss says little."""

from torch import Tensor


def correct(logits: Tensor, targets_BT: Tensor) -> Tensor:
    """How many of the targets (-100: none) are the likeliest token of logits [B, T, vocabulary], int64 scalar."""
    asked_BT = targets_BT != -100
    return (logits[asked_BT].argmax(-1) == targets_BT[asked_BT]).sum()
