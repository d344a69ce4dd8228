"""The clock of a rank's layers: their time, and none of that in which it waits for others."""

from typing import Any

import pytest
import torch
from torch import nn

import train.metrics.layer_clock
from train.metrics.layer_clock import LayerClock
from train.metrics.timing import PhaseTimes


def test_waits_and_what_lies_between_layers_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(train.metrics.layer_clock, "time", type("Clock", (), {"perf_counter": lambda: now[0]}))
    phases = PhaseTimes(clock=lambda: now[0])

    class Layer(nn.Module):
        def forward(self, x: Any) -> Any:
            now[0] += 2
            with phases("wait"):
                now[0] += 50
            now[0] += 1
            return x

    layers = [Layer(), Layer()]
    layers[0].register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 100))  # weights are gathered
    clock = LayerClock(layers, phases)
    for layer in layers:
        with phases("forward"):
            layer(torch.zeros(1))
        now[0] += 1000
    assert clock.take() == 6 and clock.take() == 0
