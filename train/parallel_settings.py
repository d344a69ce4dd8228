"""The settings of how a run is divided over ranks: sizes of the mesh, and the ways of what crosses ranks."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from parallel.schedule.comm_volume import KeyFormatName
from parallel.schedule.devices import DEVICES
from parallel.schedule.mesh import DIMENSIONS, Mesh
from parallel.schedule.stages import PIPELINE_SCHEDULES, PipelineScheduleName

if TYPE_CHECKING:
    from parallel.sequence.attention import Keys
    from parallel.sequence.states import Transport


StateTransportName = Literal["allscan", "auto", "gather", "relay"]
AttentionTransportName = Literal["gather", "ring", "ulysses", "usp"]
ExpertTransportName = Literal["counted", "padded"]
EXPERT_TRANSPORTS, KEY_FORMATS = get_args(ExpertTransportName), get_args(KeyFormatName)


@dataclass(frozen=True, kw_only=True)
class TransportSettings:
    """Transports between the ranks that share a sequence: they bring to a span what it needs of those before it.

    recurrence: transport of the states of linear mixers. gather: an all-gather, in each layer, of every span's effect
    on the state (LASP-2, 2502.07563); relay: from rank to rank, the fewest bytes (LASP, 2404.02882); allscan: the
    relay in blocks that follow each other (ZeCO, 2507.01004); auto: for each kind of recurrence the fastest of these,
    by the size of its states, the number of ranks, and latency and bandwidth as measured at the start; a resumed run
    uses the same measurement. blocks: number of blocks into which allscan cuts a state, at least 2. attention:
    transport of keys and values for softmax attention. gather: an all-gather of keys and values, a head at a time
    (Llama 3, 2407.21783, section 3.3.2); ring: they pass every rank (2310.01889); ulysses: ranks exchange tokens for
    heads (2309.14509); usp: heads over as many ranks as there are heads, a ring over the rest (2405.07719). experts:
    the way of rows to experts on other ranks (parallel.expert). counted: ranks first tell each other how many rows they
    send, and send as many; padded: every rank sends each expert as many rows as its capacity_factor allows, zeros among
    them, and waits for no count. keys: format of keys and values between ranks that share a sequence. exact: that of
    the computation; fp8 (E4M3) or int8: 8 bits a number and an exponent for each token and head; they are rounded once,
    on the rank that holds them too, whatever the transport. Gradients and states stay as they are.
    """

    recurrence: StateTransportName = "gather"
    attention: AttentionTransportName = "gather"
    blocks: int = 4
    experts: ExpertTransportName = "counted"
    keys: KeyFormatName = "exact"

    def __post_init__(self) -> None:
        if self.experts not in EXPERT_TRANSPORTS:
            accepted = ", ".join(EXPERT_TRANSPORTS)
            raise ValueError(f"parallel.transport.experts={self.experts}: must be one of {accepted}")
        if self.keys not in KEY_FORMATS:
            raise ValueError(f"parallel.transport.keys={self.keys}: must be one of {', '.join(KEY_FORMATS)}")
        if (self.recurrence, self.attention) != ("gather", "gather"):  # what is there by default costs no torch
            from parallel.sequence import TRANSPORTS

            for kind, known in TRANSPORTS.items():
                name = getattr(self, kind)
                if name not in known:
                    raise ValueError(f"parallel.transport.{kind}={name}: must be one of {', '.join(known)}")
        if self.blocks < 2:
            raise ValueError(f"parallel.transport.blocks={self.blocks}: must be at least 2, or nothing overlaps")

    def build(self) -> tuple["Transport", "Keys"]:
        """The transport of effects, and that of keys and values."""
        from parallel.sequence import TRANSPORTS

        options = {"blocks": self.blocks} if self.recurrence in ("allscan", "auto") else {}
        attention = TRANSPORTS["attention"][self.attention](keys=self.keys)
        return TRANSPORTS["recurrence"][self.recurrence](**options), attention


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """The machines that a layout is chosen for, and held against.

    device: kind of device whose published figures are taken, a100, a100_40g, b200, h100 or h200; null for this
    machine's. `farspan plan` needs none of them. memory: GiB of a rank; null for the device's. A run whose tensors need
    more is refused, where this or `device` is given. ranks: number of ranks of a machine, whose messages do not leave
    it; null for the device's 8, or for all ranks without a device.
    """

    device: str | None = None
    memory: float | None = None
    ranks: int | None = None

    def __post_init__(self) -> None:
        if self.device is not None and self.device not in DEVICES:
            raise ValueError(f"parallel.machine.device={self.device}: must be one of {', '.join(sorted(DEVICES))}")
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"parallel.machine.memory={self.memory}: must be above 0, or null")
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"parallel.machine.ranks={self.ranks}: must be at least 1, or null")


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Sizes of the mesh, whose product is cluster.workers.

    data: groups of ranks, each with sequences of its own; null for what the workers leave. sequence: ranks of a group,
    which share each of its sequences; null for what the workers leave: all of them, where `data` is null too.
    replicate: copies of the sharded weights, whose gradients are summed over them (HSDP). pipeline: ranks that have
    layers of their own, each a stage or several. pipeline_schedule: order of their work. 1f1b: forward and backward
    passes in turn (2006.09503); interleaved: the same with several stages a rank, for less waiting and more messages
    (2104.04473); zero_bubble: gradients of weights are computed while a rank would wait (2401.10241). pipeline_layers:
    numbers of layers of the stages, first to last; null for cuts that make the heaviest stage as light as can be, by
    FLOPs, the head's included. stages_per_rank: stages of each pipeline rank, one round after another. expert: ranks
    that share out each layer's experts. tensor: ranks that share the heads and widths of each layer. auto: true chooses
    all sizes that are 1 or null, micro-steps (scheduler.tokens_per_rank) and, where engine.recompute is none,
    recomputation: the fastest layout, by a cost model, of those that fit a rank's memory.
    """

    data: int | None = None
    sequence: int | None = None
    replicate: int = 1
    pipeline: int = 1
    pipeline_schedule: PipelineScheduleName = "1f1b"
    pipeline_layers: list[int] | None = None
    stages_per_rank: int = 1
    expert: int = 1
    tensor: int = 1
    transport: TransportSettings = TransportSettings()
    auto: bool = False
    machine: MachineSettings = MachineSettings()

    def __post_init__(self) -> None:
        name, each = self.pipeline_schedule, self.stages_per_rank
        if name not in PIPELINE_SCHEDULES:
            raise ValueError(f"parallel.pipeline_schedule={name}: must be one of {', '.join(PIPELINE_SCHEDULES)}")
        if each < 1 or name == "1f1b" and each > 1:
            must = "must be 1 with parallel.pipeline_schedule=1f1b" if each > 1 else "must be at least 1"
            raise ValueError(f"parallel.stages_per_rank={each}: {must}")
        if name == "interleaved" and each == 1:
            raise ValueError(
                "parallel.stages_per_rank=1: must be at least 2 with parallel.pipeline_schedule=interleaved"
            )

    @property
    def stages(self) -> int:
        """The number of stages of all pipeline ranks."""
        return self.pipeline * self.stages_per_rank

    def without_pipeline(self) -> "ParallelSettings":
        """The same workers, each with all layers."""
        data = None if self.data is None else self.data * self.pipeline
        own: dict[str, Any] = {"pipeline_schedule": "1f1b", "pipeline_layers": None, "stages_per_rank": 1}
        return replace(self, pipeline=1, data=data, **own)

    def mesh(self, workers: int) -> Mesh:
        """The sizes, whose product is `workers`. Raises ValueError when it cannot be, and prints the factors."""
        given = {name: size for name in DIMENSIONS if (size := getattr(self, name)) is not None}
        for name, size in given.items():
            if size < 1 or workers % size:
                raise ValueError(f"parallel.{name}={size}: must divide cluster.workers={workers}")
        product = math.prod(given.values())
        chosen = {name: size for name, size in given.items() if size > 1 or name in ("data", "sequence")}
        factors = " × ".join(f"parallel.{name}={size}" for name, size in chosen.items())
        if workers % product or workers != product and {"data", "sequence"} <= given.keys():
            raise ValueError(f"{factors}: is {product}, must be cluster.workers={workers}")
        left = workers // product
        return Mesh(**{"data" if self.data is None and self.sequence is not None else "sequence": left, **given})
