"""The description of a run: made once from the command line, written once as config.yaml, given to every worker.

A `RunConfig` is complete and checked (`launch.config.compose`), and nothing writes into it: who settles a value makes a
new one with `dataclasses.replace`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from typing import Any

from parallel.schedule.adaptive.settings import CostSettings, SimulationSettings
from train.distill_settings import DISTILL_TARGETS, ConvertSettings, DistillTarget
from train.instantiate import construct
from train.settings import (
    ClusterSettings,
    EvaluateSettings,
    ParallelSettings,
    PrecisionSettings,
    RunSettings,
    TrainSettings,
    section,
)

SECTIONS: dict[str, type] = {
    "parallel": ParallelSettings,
    "precision": PrecisionSettings,
    "cluster": ClusterSettings,
    "run": RunSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "simulation": SimulationSettings,
    "cost": CostSettings,
    "convert": ConvertSettings,
}


@dataclass(frozen=True)
class ObjectConfig:
    """An object that a configuration describes: its class, as `_target_`, and what its constructor is called with."""

    values: Mapping[str, Any]

    @property
    def target(self) -> str:
        """The class, by the package that hands it on."""
        return self.values["_target_"]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """A value; `default` where the class has no such key."""
        return self.values.get(key, default)

    def having(self, **values: Any) -> ObjectConfig:
        """The same object with these values."""
        return ObjectConfig({**self.values, **values})

    def build(self) -> Any:
        """A new object. Raises ValueError for a class from elsewhere, and what the constructor raises for a value."""
        return construct(dict(self.values))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of a chain that extends a context or converts a model, each from the one before (docs/extension.md).

    Keys that a stage does not have are those of the configuration.

    length: its data.max_length, in tokens; at least that of the stage before. tokens: its budget. positions: the rule
    of rotary positions of every softmax layer that has some, an object of `models.positions`, or only its keys that
    change; layers whose window is no wider than the length trained so far stay as they are where others see all of a
    document; null for the rule as it is. lr: the learning rate that its schedule multiplies; null for optimizer.lr.
    weights: of data=mixture, by source its weight in this stage; null for those that the sources have. batch_tokens:
    tokens of a step; null for train.batch_tokens, or for the length where that is more. distill: what the stage learns
    from the model that the chain begins with, as train.distill.target; null for nothing.
    """

    length: int
    tokens: int
    positions: Any = None
    lr: float | None = None
    weights: dict[str, float] | None = None
    batch_tokens: int | None = None
    distill: DistillTarget | None = None

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
        if self.distill not in (None, *DISTILL_TARGETS):
            raise ValueError(f"distill={self.distill}: must be one of {', '.join(DISTILL_TARGETS)}, or null")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, as docs/configuration.md has its keys: sections of settings, and the objects that the run is built from.

    model: built on the meta device and then filled. optimizer: called with the parameter groups.
    """

    model: ObjectConfig
    data: ObjectConfig
    curriculum: ObjectConfig
    scheduler: ObjectConfig
    parallel: ParallelSettings
    engine: ObjectConfig
    optimizer: ObjectConfig
    schedule: ObjectConfig
    precision: PrecisionSettings
    cluster: ClusterSettings
    tracking: ObjectConfig
    seed: int
    init_from: str | None
    resume: str | None
    stages: tuple[Stage, ...]
    run: RunSettings
    train: TrainSettings
    evaluate: EvaluateSettings
    simulation: SimulationSettings
    cost: CostSettings
    convert: ConvertSettings

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunConfig:
        """Reads a complete configuration. Raises what the settings' constructors raise."""
        arguments: dict[str, Any] = {}
        for each in fields(cls):
            value = deepcopy(values[each.name])
            if each.name in SECTIONS:
                value = section(SECTIONS[each.name], value)
            elif each.name == "stages":
                value = tuple(Stage(**stage) for stage in value)
            elif each.type == "ObjectConfig":
                value = ObjectConfig(value)
            arguments[each.name] = value
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.yaml; `of` takes it back."""
        values: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, ObjectConfig):
                value = deepcopy(dict(value.values))
            elif each.name == "stages":
                value = [asdict(stage) for stage in value]
            elif each.name in SECTIONS:
                value = asdict(value)
            values[each.name] = value
        return values
