"""The settings of distillation, and those of a conversion."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

DistillTarget = Literal["logits", "hidden"]
DISTILL_TARGETS = get_args(DistillTarget)
KeepRule = Literal["place", "score"]


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
    linear or retnet; null for none. options: keys of its constructor and their values; heads and widths are those of
    the attention. window: the number of tokens that a converted layer's attention goes on seeing, itself included, with
    the weights that it has; the linear mixer stands beside it, silent at first, for what lies further back, or, where
    convert.mixer is null, nothing does; null for the linear mixer in the attention's place. every: of so many softmax
    layers one stays as it is. by: place, the last of so many stays; score, as many stay, those whose own restriction to
    the window (64 tokens where convert.window is null) costs the model the most. keep: the layers that stay, by their
    numbers from 0; null for those of `every` and `by`.
    """

    mixer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    every: int = 4
    by: KeepRule = "place"
    keep: list[int] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"convert.every={self.every}: must be at least 1")
        if self.window is not None and self.window < 1:
            raise ValueError(f"convert.window={self.window}: must be at least 1")
        if self.by not in get_args(KeepRule):
            raise ValueError(f"convert.by={self.by}: must be one of {', '.join(get_args(KeepRule))}")
        if self.mixer is None:
            if self.options:
                raise ValueError(f"convert.options={self.options}: must come with convert.mixer")
            for key, without in (("keep", None), ("by", "place")) if self.window is None else ():
                if (value := getattr(self, key)) != without:
                    raise ValueError(f"convert.{key}={value}: must come with convert.mixer or convert.window")

    @property
    def override(self) -> str | None:
        """The key that asks for a conversion, with its value; None without one."""
        if self.mixer is not None:
            return f"convert.mixer={self.mixer}"
        return None if self.window is None else f"convert.window={self.window}"
