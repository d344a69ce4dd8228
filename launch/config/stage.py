"""Runs one after another, each from the one before: stages of a context extension (docs/extension.md)."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of a chain. Keys that a stage does not have are those of the configuration.

    length: its data.max_length, in tokens; at least that of the stage before. tokens: its budget. positions: the rule
    of rotary positions of every softmax layer that has some, an object of `models.positions`, or only its keys that
    change; null for the rule as it is. lr: the learning rate that its schedule multiplies; null for optimizer.lr.
    weights: of data=mixture, by source its weight in this stage; null for those that the sources have. batch_tokens:
    tokens of a step; null for train.batch_tokens, or for the length where that is more.
    """

    length: int
    tokens: int
    positions: Any = None
    lr: float | None = None
    weights: dict[str, float] | None = None
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("length", "tokens", "batch_tokens", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be above 0")
        if self.positions is not None and not isinstance(self.positions, dict):
            raise ValueError(f"positions={self.positions}: must be an object, or keys of the rule that is there")
        for source, weight in (self.weights or {}).items():
            if weight < 0:
                raise ValueError(f"weights.{source}={weight}: must not be negative")
