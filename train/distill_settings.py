"""The settings of distillation, and those of a conversion."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

DistillTarget = Literal["logits", "hidden"]
DISTILL_TARGETS = get_args(DistillTarget)


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """A model that the run's model learns from; it reads the same tokens, and its weights never change.

    teacher: a run, a checkpoint or a folder of Hugging Face's, of the same vocabulary; null for none. target: what is
    learnt from it. logits: its distribution over the next token, beside the text itself; hidden: what its layers make
    of their inputs, for those layers whose mixers are of another kind here, whose mixers alone are trained. weight:
    share of the distribution in the objective, the rest being the cross-entropy; of `logits`. temperature: divisor of
    the logits of both models in the divergence; of `logits`.
    """

    teacher: str | None = None
    target: DistillTarget = "logits"
    weight: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.target not in DISTILL_TARGETS:
            raise ValueError(f"train.distill.target={self.target}: must be one of {', '.join(DISTILL_TARGETS)}")
        if self.teacher is None and self.target == "hidden":
            raise ValueError("train.distill.target=hidden: must come with train.distill.teacher")
        if not 0 < self.weight <= 1:
            raise ValueError(f"train.distill.weight={self.weight}: must be above 0, and at most 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"train.distill.temperature={self.temperature}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Layers of softmax attention that become linear ones before the first stage of a chain (docs/conversion.md).

    mixer: the linear mixer, one that can begin from the weights of attention: gla, gated_deltanet, deltanet, kda,
    linear or retnet; null for no conversion. options: keys of its constructor and their values; heads and widths are
    those of the attention that it replaces. every: of so many softmax layers the last one stays as it is. keep: the
    layers that stay, by their numbers from 0; null for those of `every`.
    """

    mixer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    every: int = 4
    keep: list[int] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"convert.every={self.every}: must be at least 1")
        if self.mixer is None:
            for key, without in (("options", {}), ("keep", None)):
                if (value := getattr(self, key)) != without:
                    raise ValueError(f"convert.{key}={value}: must come with convert.mixer")
