"""The seconds that a rank computes in its layers, without the time in which it waits for other ranks."""

import time
from typing import Any

from torch import nn

from train.metrics.timing import PhaseTimes


class LayerClock:
    """Wall seconds inside the forward passes of a model's layers, waits left out: what shows that a rank is slow.

    Ranks are in lockstep, so a step takes as long on a fast rank as on a slow one; only the time between a layer's
    weights being there and its output tells them apart. Of CPUs: on a GPU a forward pass returns before it has run, so
    that there the clock stays at 0.
    """

    def __init__(self, layers: Any, phases: PhaseTimes):
        self._phases, self._seconds, self._began = phases, 0.0, 0.0
        for layer in layers:
            self._watch(layer)

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _watch(self, layer: nn.Module) -> None:
        def begin(*_: Any) -> None:  # behind the hook that gathers weights, which was there before
            self._began = time.perf_counter() - self._phases.spent("wait")

        def end(*_: Any) -> None:
            self._seconds += time.perf_counter() - self._phases.spent("wait") - self._began

        layer.register_forward_pre_hook(begin)
        layer.register_forward_hook(end, prepend=True)
