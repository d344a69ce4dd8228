"""Scales from the magnitudes of earlier steps, so that codes need not wait for the largest value of their own matrix.

Transformer Engine's delayed scaling (`transformer_engine.common.recipe.DelayedScaling`, margin 0, the largest of the
window): a matrix's scale brings the largest magnitude of the last steps to the largest code; what is larger still is
cut off there. The magnitudes of a step are those of all of its micro-steps and ranks, and count from the next step on.
So a step's scales are known before it begins and are the same on every rank, whatever the layout; a matrix without a
past, in the first step, has the scale of its own values.
"""

import torch
from torch import Tensor, nn

INPUTS, WEIGHTS, GRADIENTS = range(3)
STEPS = 1024  # that are remembered: Transformer Engine's default


class Magnitudes(nn.Module):
    """The largest magnitudes of the three matrices of a layer's products, x, W and g, in the last steps.

    past: [3, steps] in fp32 or fp64, the newest step first, 0 where there was none; part of every checkpoint. present:
    [3], the largest of this step so far on this rank. known: whether a step has ended since the buffers were filled, so
    that the host need not ask the device for it.
    """

    past: Tensor
    present: Tensor

    def __init__(self, steps: int = STEPS):
        super().__init__()
        self.register_buffer("past", torch.empty(3, steps, dtype=torch.float32))
        self.register_buffer("present", torch.empty(3, dtype=torch.float32), persistent=False)
        self.start_buffers()

    def start_buffers(self) -> None:
        """No past."""
        self.past.zero_()
        self.present.zero_()
        self.known = False

    def expected(self, matrix: int, now: Tensor) -> Tensor:
        """The magnitude, [1, 1], that a matrix is scaled by whose largest is `now` [1, 1]: that of the past, or `now`
        without one. nan where `now` is not finite, which codes would cut off and so hide."""
        before = self.past[matrix].amax().to(now.dtype)
        return torch.where(torch.isfinite(now), torch.where(before > 0, before, now), torch.nan)

    def note(self, matrix: int, now: Tensor) -> None:
        """Counts a magnitude of this step; the same one twice, as of what is computed again, counts once."""
        self.present[matrix] = torch.maximum(self.present[matrix], now.view(()).to(self.present.dtype))

    @torch.no_grad()
    def settle(self, largest: Tensor) -> None:
        """Ends a step whose largest magnitudes over all ranks were these, [3]. One that is not finite is as none."""
        newest = torch.where(torch.isfinite(largest), largest, 0).to(self.past)
        self.past.copy_(torch.cat((newest.unsqueeze(1), self.past[:, :-1]), 1))
        self.present.zero_()
        self.known = True


def histories(model: nn.Module) -> dict[str, Magnitudes]:
    """By name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Magnitudes)}


def present(model: nn.Module) -> Tensor | None:
    """The largest magnitudes of this step on this rank, [products x 3]; None where no scales are delayed."""
    each = [history.present for history in histories(model).values()]
    return torch.cat(each) if each else None


def settle(model: nn.Module, largest: Tensor) -> None:
    """Ends a step: `largest` is the largest over ranks of `present`, [products x 3]."""
    for history, own in zip(histories(model).values(), largest.view(-1, 3), strict=True):
        history.settle(own)


def forget(model: nn.Module) -> None:
    """Drops what this step has seen: the guard held it back."""
    for history in histories(model).values():
        history.present.zero_()
