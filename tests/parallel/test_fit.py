"""Constants that are known, from times that are made with them."""

import numpy as np
import pytest

from parallel.schedule.adaptive.cost import Layer
from parallel.schedule.adaptive.fit import Step, fit, fit_layers, fit_wire

RNG = np.random.default_rng(0)


def _steps(pair: float, token: float, launch: float, noise: float = 0.0, window: int | None = None) -> list[Step]:
    shape, found = Layer(4, window=window), []
    for lengths in ([64], [512], [4096], [256] * 8, [1024, 128], [8192], [2048] * 2, [32] * 64):
        n = np.array(lengths, dtype=float)
        seconds = launch + 4 * (pair * shape.pairs(n).sum() + token * n.sum())
        found.append(Step(tuple(lengths), seconds * (1 + noise * RNG.standard_normal())))
    return found


@pytest.mark.parametrize("window", [None, 256])
def test_constants_come_back(window):
    layer, launch, found = fit_layers(_steps(3e-9, 2e-6, 5e-3, window=window), layers=4, window=window)
    assert (layer.pair, layer.token, launch) == pytest.approx((3e-9, 2e-6, 5e-3), rel=1e-6)
    assert found.worst < 1e-9 and found.samples == 8 and "8 samples, error 0.0%" in found.text()


def test_errors_are_those_of_the_noise():
    runs = [fit_layers(_steps(3e-9, 2e-6, 5e-3, noise=0.05), layers=4)[2] for _ in range(200)]
    for name, true in (("pair", 3e-9), ("token", 2e-6), ("launch", 5e-3)):
        spread = np.sqrt(np.mean([(run.constants[name] - true) ** 2 for run in runs]))
        assert np.median([run.errors[name] for run in runs]) == pytest.approx(spread, rel=0.35)
    assert np.mean([run.rms for run in runs]) == pytest.approx(0.05 * np.sqrt(5 / 8), rel=0.1)


def test_nothing_is_negative():
    layer, launch, found = fit_layers(_steps(3e-9, 2e-6, -1e-5), layers=4)
    assert launch == 0 and layer.pair > 0 and layer.token > 0 and found.worst > 1e-3


def test_wires():
    sizes = [1e3, 1e4, 1e5, 1e6, 1e7]
    wire, found = fit_wire(sizes, [2e-4 + size / 5e9 for size in sizes])
    assert (wire.latency, wire.bandwidth) == pytest.approx((2e-4, 5e9)) and found.worst < 1e-9
    with pytest.raises(ValueError, match="send longer ones"):
        fit_wire([1e3, 2e3, 3e3], [3e-4, 2e-4, 1e-4])


def test_what_cannot_be_told_apart_is_named():
    with pytest.raises(ValueError, match="do not tell pair and token and launch apart"):
        fit_layers([Step((512,), 1.0 + i) for i in range(5)], layers=4)
    with pytest.raises(ValueError, match="2 samples for pair, token, launch"):
        fit_layers([Step((512,), 1.0), Step((64,), 0.5)], layers=4)
    with pytest.raises(ValueError, match="of positive seconds"):
        fit({"a": [1.0]}, [0.0])
    with pytest.raises(ValueError, match="no sample depends on a"):
        fit({"a": [0.0, 0.0], "b": [1.0, 2.0]}, [1.0, 2.0])
