"""The objective: cross-entropy summed over tokens, divided by the step's global targets, plus the routers' losses."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from models.distillation import Distilled
from models.lm import Output
from models.precision import wide


class LossSums(NamedTuple):
    """Sums over this rank's tokens of one micro-step; they add up over micro-steps and ranks."""

    cross_entropy: Tensor  # nats, scalar with gradient
    balance: Tensor  # scalar with gradient, mean over layers; 1 a token when balanced
    load: dict[str, Tensor]  # by layer, choices of each expert [E]
    z: Tensor  # scalar with gradient, the routers' z-loss, mean over layers
    dropped: dict[str, Tensor]  # by layer whose experts have a capacity, choices that found no place
    correct: Tensor | None = None  # targets that are the likeliest token, where no gradient is taken
    taught: Tensor | None = None  # scalar with gradient, in the cross-entropy's place, of a run with a teacher
    divergence: Tensor | None = None  # scalar: of the teacher's distribution from the model's, nats
    ahead: Tensor | None = None  # [M] with gradient, nats of each module of multi-token prediction, where they ran
    index_loss: Tensor | None = None  # scalar: the loss of the indices of selected attention, which their layers add

    def objective(
        self,
        *,
        targets: int,
        tokens: int,
        balance_weight: float,
        z_weight: float = 0.0,
        mtp_weight: float = 0.0,
        targets_ahead: Sequence[int] = (),
    ) -> Tensor:
        """This rank's part of the step's loss. It is divided by global counts, so that parts sum and never average.

        targets_ahead: of each module of multi-token prediction, as `targets`.
        """
        routers = balance_weight * self.balance + z_weight * self.z
        nats = self.cross_entropy if self.taught is None else self.taught
        main = nats / max(targets, 1) + routers / max(tokens, 1)
        return main if self.ahead is None else main + mtp_weight * mean_ahead(self.ahead.unbind(), targets_ahead)


def mean_ahead(nats: Sequence[Any], targets: Sequence[int]) -> Any:
    """The mean over modules of multi-token prediction of their nats a target, from sums over targets."""
    return sum(n / max(count, 1) for n, count in zip(nats, targets, strict=True)) / max(len(targets), 1)


def distilled(found: Distilled) -> LossSums:
    """Sums from a pass with a teacher's objective."""
    return sums(found.output)._replace(taught=found.objective, divergence=found.divergence)


def sums(output: Output, targets_BT: Tensor | None = None) -> LossSums:
    """Sums from an output with its cross-entropy, or from one with logits and the targets that they are held to.

    Targets of -100 do not count; a rank with none adds a zero that still reaches every parameter.
    """
    if output.cross_entropy is not None:
        counts = output.balance, output.load, output.z, output.dropped, output.correct
        return LossSums(output.cross_entropy, *counts, ahead=output.ahead, index_loss=output.index_loss)
    if targets_BT is None:
        raise ValueError("targets: needed for an output of logits")
    logits = wide(output.logits).flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, targets_BT.flatten(), ignore_index=-100, reduction="sum")
    return LossSums(cross_entropy, output.balance, output.load, output.z, output.dropped)
