"""The settings that are not objects of their own: one dataclass a section, its fields the keys that YAML may set.

Constructors check values; the configuration's keys and types are checked against these signatures, and those of every
`_target_`, before a process starts.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """dir: the run's folder. name: its last part by default, and the name in the tracker."""

    name: str | None = None
    dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long and how often, in tokens. `steps`, where given, replaces `tokens`.

    batch_tokens: tokens of a step over all ranks. balance_weight: of the experts' balance loss. clip: largest gradient
    norm. evaluate_every, checkpoint_every: tokens between two; null for only at the end. keep: newest checkpoints kept.
    """

    tokens: int = 1_000_000
    steps: int | None = None
    batch_tokens: int = 4096
    balance_weight: float = 0.01
    clip: float = 1.0
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "clip", "keep"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be above 0")
        for name in ("steps", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name}={value}: must be at least 1, or null")
        if self.balance_weight < 0:
            raise ValueError(f"train.balance_weight={self.balance_weight}: must not be negative")

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else -(-self.tokens // self.batch_tokens)

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.batch_tokens


@dataclass(frozen=True, kw_only=True)
class TransportSettings:
    """Names in `parallel.sequence.TRANSPORTS`."""

    recurrence: str = "gather"
    attention: str = "gather"

    def __post_init__(self) -> None:
        from parallel.sequence import TRANSPORTS

        for kind, known in TRANSPORTS.items():
            name = getattr(self, kind)
            if name not in known:
                raise ValueError(f"parallel.transport.{kind}={name}: must be one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Sizes of the mesh. A null `data` or `sequence` is what the workers leave; both null: all of them on sequence."""

    data: int | None = None
    sequence: int | None = None
    transport: TransportSettings = TransportSettings()

    def sizes(self, workers: int) -> tuple[int, int]:
        """(data, sequence), whose product is `workers`. Raises ValueError when it cannot be."""
        for name in ("data", "sequence"):
            size = getattr(self, name)
            if size is not None and (size < 1 or workers % size):
                raise ValueError(f"parallel.{name}={size}: must divide cluster.workers={workers}")
        if self.sequence is None:
            data = self.data or 1
            return data, workers // data
        data = self.data or workers // self.sequence
        if data * self.sequence != workers:
            raise ValueError(
                f"parallel.data={self.data}: times parallel.sequence={self.sequence} must be cluster.workers={workers}"
            )
        return data, self.sequence


KINDS = ("none", "local", "ray")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """Where the workers run.

    kind: none (spawned here), local (a Ray started here) or ray (one that runs already, at `address`). workers: one a
    GPU or, on CPUs, one a core. threads: of each worker; null for its machine's cores divided among the workers there.
    device: auto takes CUDA where there is one for every worker. address: of the Ray; http://HOST:PORT (its dashboard,
    from anywhere) hands the run over as a job, `auto` or HOST:PORT joins it from one of its machines; null for what
    RAY_ADDRESS says. restarts: new attempts from the last checkpoint after a worker or a machine is lost. template:
    the machines to start, for `farspan template`.
    """

    kind: str = "local"
    workers: int = 2
    threads: int | None = None
    device: str = "auto"
    address: str | None = None
    restarts: int = 0
    template: Any = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"cluster.kind={self.kind}: must be one of {', '.join(KINDS)}")
        if self.device not in DEVICES:
            raise ValueError(f"cluster.device={self.device}: must be one of {', '.join(DEVICES)}")
        if self.workers < 1:
            raise ValueError(f"cluster.workers={self.workers}: must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"cluster.threads={self.threads}: must be at least 1, or null")
        if self.template is not None and not isinstance(self.template, dict):
            raise ValueError(
                f"cluster.template={self.template}: must be null, or come with cluster=slurm, kuberay or ray_up"
            )
        if self.restarts < 0:
            raise ValueError(f"cluster.restarts={self.restarts}: must not be negative")


COMPUTE = ("auto", "bf16", "fp32", "fp64")


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    """compute: the dtype of matmuls; auto is bf16 where the device multiplies it natively. Master weights are fp32, or

    fp64 when computing in fp64 (to compare layouts).
    """

    compute: str = "auto"

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE:
            raise ValueError(f"precision.compute={self.compute}: must be one of {', '.join(COMPUTE)}")


def section(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """A settings object from its part of the resolved configuration."""
    values = dict(values)
    if kind is ParallelSettings and "transport" in values:
        values["transport"] = TransportSettings(**values["transport"])
    return kind(**values)
