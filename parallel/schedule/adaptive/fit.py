"""Constants of the cost model from measured times, by least squares, with their errors.

Residuals are relative, so that a short sequence's time counts as much as a long one's. A constant that comes out
negative is none: it is set to zero and the others are fitted again. Constants that the samples cannot tell apart (all
of one length, all of one size) are refused by name rather than shared out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel.schedule.adaptive.cost import Floats, Layer, Wire


@dataclass(frozen=True)
class Fit:
    """constants by name, and the standard error of each (nan where samples are as few as constants). rms, worst:
    relative errors over the samples."""

    constants: dict[str, float]
    errors: dict[str, float]
    rms: float
    worst: float
    samples: int

    def text(self) -> str:
        """For people, a line a constant."""
        lines = [f"{self.samples} samples, error {self.rms:.1%} on average, {self.worst:.1%} at worst"]
        return "\n".join([*lines, *(f"  {n:<10} {v:.4g} ± {self.errors[n]:.2g}" for n, v in self.constants.items())])


def fit(features: Mapping[str, Sequence[float] | Floats], seconds: Sequence[float] | Floats) -> Fit:
    """seconds = sum over names of constant · feature. Raises ValueError where samples are too few, not positive, or
    do not tell the constants apart."""
    names, y = list(features), np.asarray(seconds, dtype=np.float64)
    columns = np.stack([np.asarray(features[name], dtype=np.float64) for name in names], axis=1)
    if len(y) < len(names) or (y <= 0).any():
        raise ValueError(
            f"{len(y)} samples for {', '.join(names)}: at least {len(names)}, of positive seconds, are needed"
        )
    weighted = columns / y[:, None]
    scale = np.linalg.norm(weighted, axis=0)
    if unknown := [name for name, s in zip(names, scale, strict=True) if s == 0]:
        raise ValueError(f"no sample depends on {', '.join(unknown)}")
    _, singular, directions = np.linalg.svd(weighted / scale)
    if singular[-1] < 1e-9 * singular[0]:
        unseen = np.abs(directions[singular < 1e-9 * singular[0]]).max(0)
        mixed = [name for name, part in zip(names, unseen, strict=True) if part > 0.1]
        raise ValueError(f"the samples do not tell {' and '.join(mixed)} apart")
    rows = list(range(len(names)))
    values, covariance = np.zeros(len(names)), np.zeros((len(names), len(names)))
    while rows:
        own = weighted[:, rows] / scale[rows]
        part = np.linalg.lstsq(own, np.ones(len(y)), rcond=None)[0]
        if part.min() >= 0:
            free = len(y) - len(rows)
            noise = float(((own @ part - 1) ** 2).sum()) / free if free else np.nan
            spread = np.sqrt(np.diag(np.linalg.inv(own.T @ own)) * noise)
            values[rows], covariance[rows, rows] = part / scale[rows], spread / scale[rows]
            break
        rows.pop(int(part.argmin()))
    residual = columns @ values / y - 1
    errors = dict(zip(names, np.diag(covariance).tolist(), strict=True))
    rms, worst = float(np.sqrt((residual**2).mean())), float(np.abs(residual).max())
    return Fit(dict(zip(names, values.tolist(), strict=True)), errors, rms, worst, len(y))


class Step(NamedTuple):
    """A measured micro-step of one rank: the tokens of its sequences, and what it took."""

    lengths: tuple[int, ...]
    seconds: float


def fit_layers(steps: Sequence[Step], *, layers: int, window: int | None = None) -> tuple[Layer, float, Fit]:
    """Layers of one kind, the launch, and how well they explain the steps."""
    shape = Layer(layers, window=window)
    tokens = [np.array(step.lengths, dtype=np.float64) for step in steps]
    fitted = fit(
        {
            "pair": [layers * float(shape.pairs(t).sum()) for t in tokens],
            "token": [layers * float(t.sum()) for t in tokens],
            "launch": np.ones(len(steps)),
        },
        [step.seconds for step in steps],
    )
    own = fitted.constants
    return Layer(layers, pair=own["pair"], token=own["token"], window=window), own["launch"], fitted


def fit_wire(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[Wire, Fit]:
    """Fits a wire to messages of `sizes` bytes. Raises ValueError also where time does not grow with them."""
    fitted = fit({"latency": np.ones(len(sizes)), "byte": sizes}, seconds)
    if not fitted.constants["byte"]:
        raise ValueError(f"messages of up to {max(sizes):,.0f} bytes take no longer than short ones: send longer ones")
    return Wire(1 / fitted.constants["byte"], fitted.constants["latency"]), fitted
