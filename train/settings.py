"""The settings that are not objects of their own: one dataclass a section, its fields the keys that YAML may set.

Constructors check values; the configuration's keys and types are checked against these signatures, and those of every
`_target_`, before a process starts.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from data.batch_ramp import Ramp
from train.distill_settings import DistillSettings
from train.parallel_settings import MachineSettings, ParallelSettings, TransportSettings

Settings = TypeVar("Settings")


NAME_BYTES = 255  # of a folder's name


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Name and folder of a run.

    name: the run's name here and in the tracker, 255 bytes at most; null for the last part of `dir` or, without one,
    for date and time. dir: the run's folder, new unless the run is resumed; null for runs/NAME. plot: file (PNG) to
    which `farspan plan` draws learning rate and batch size over the run's tokens; null for none. anew: true lets
    `resume` begin at step 0 where no checkpoint of the run is whole; damaged ones stay, each under a name that nothing
    reads.
    """

    name: str | None = None
    dir: str | None = None
    plot: str | None = None
    anew: bool = False

    def __post_init__(self) -> None:
        if (name := self.name) is None:
            return
        parts = name.split("/")  # of a stage of a chain: the chain's, and its own
        if {"", ".", ".."} & set(parts) or not name.isprintable():
            raise ValueError(f"run.name={name!r}: must be a name, of letters that can be seen; run.dir is a folder")
        if max(len(part.encode()) for part in parts) > NAME_BYTES:
            raise ValueError(f"run.name={name[:40]}…: must have at most {NAME_BYTES} bytes, as a folder's name has")


SpanGradient = Literal["exact", "truncated"]
SPAN_GRADIENTS = get_args(SpanGradient)
AverageKind = Literal["none", "ema", "last"]
AVERAGES = get_args(AverageKind)
InitWeights = Literal["raw", "average"]
INIT_WEIGHTS = get_args(InitWeights)
InitOptimizer = Literal["reset", "keep", "reset_mean", "reset_moments"]
INIT_OPTIMIZER = get_args(InitOptimizer)


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """Limits beyond which a step is passed over, and beyond which a run goes back.

    A step whose gradient is not finite never reaches the weights. sigma: standard deviations above the mean of a window
    that loss and gradient norm may reach; a step beyond them is passed over; null for no such limit. window: steps of
    that window; the limit holds once it is half full. skips: batches among the last `window` that may be passed over;
    at so many the run loads a checkpoint from before them, and passes over all data up to where it stands. rollbacks:
    times that it may do so before it ends. backoff: factor of the learning rate after each of these, above 0 and at
    most 1.
    """

    sigma: float | None = None
    window: int = 128
    skips: int = 8
    rollbacks: int = 3
    backoff: float = 0.5

    def __post_init__(self) -> None:
        if self.sigma is not None and not self.sigma > 0:
            raise ValueError(f"train.guard.sigma={self.sigma}: must be above 0, or null")
        for name, least in (("window", 2), ("skips", 1), ("rollbacks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"train.guard.{name}={getattr(self, name)}: must be at least {least}")
        if not 0 < self.backoff <= 1:
            raise ValueError(f"train.guard.backoff={self.backoff}: must be above 0, and at most 1")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Budget, batch, losses, clipping, averages and checkpoints of training. Lengths of time are tokens.

    tokens: the budget, rounded up to whole steps; the schedule lays the learning rate out over it. steps: the budget in
    steps; null for that in `tokens`. batch_tokens: tokens of a step over all ranks, padding included, though padding
    counts nowhere else; a multiple of data.max_length; for a batch that grows, lines of [token, number]: steps from
    that token of the order on have so many. init_optimizer: use of the optimizer's state with init_from: reset starts
    it anew, with its count of steps; keep continues all of it; reset_mean sets the running means of gradients to 0;
    reset_moments sets those of their squares to 0 as well, so that only the count continues and the first updates are
    small. loss_chunk: tokens whose logits exist at a time for the cross-entropy and its gradient; null for all of them.
    span_tokens: tokens of a sequence that a rank trains on at a time, at most; a longer sequence is trained span after
    span, through the same states; null for no limit. span_gradient: exact runs forward through all spans and then back,
    each once more from its entering states (1606.03401), for the gradient of the whole; truncated ends gradients at the
    borders of spans, and sums over documents at the tokens read so far. balance_weight: weight of the experts' balance
    loss (2101.03961, section 2.2) beside the cross-entropy; 0 for none. z_weight: weight of the routers' z-loss, which
    keeps their logits small (2202.08906, equation 5); 0 for none. mtp_weight: weight of the loss of multi-token
    prediction, the mean of that of model.mtp_layers modules (2412.19437, equation 25); read with modules only.
    index_weight: weight of the loss by which the index of mixer=dsa learns, summed over layers. clip:
    largest 2-norm of all gradients together; larger ones are scaled down to it. clip_each: largest 2-norm of one
    weight's gradient, before that; null for any. clip_value: largest magnitude of an element of a gradient, before
    both; null for any. average: an average of the weights, evaluated and saved beside them. ema: an exponential mean;
    last: the mean of some of the last (LAWA, 2209.14981); none. average_tokens: tokens over which ema forgets, or
    between two of the weights that `last` averages; null for a twentieth of the budget. average_count: number of
    weights that `last` averages. init_weights: weights of a checkpoint that init_from loads; raw: the trained ones;
    average: their average. evaluate_every: tokens between two evaluations of the held-out loss; null for one, at the
    end. evaluate_tokens: held-out tokens that an evaluation before the end reads, about, the same each time; the one at
    the end reads all of data.heldout_tokens; null for all of them each time. checkpoint_every: tokens between two
    checkpoints; null for one, at the end, which a stopped run writes too. checkpoint_async: write those before the end
    beside training, from a copy of weights and optimizer state that each rank makes; false saves the copy's memory, and
    training waits. keep: number of the newest checkpoints that stay on disk. mfu: record model FLOP/s, and their share
    of the devices' rate of matmuls; rank 0 counts and measures them for a second or two before the first step.
    """

    tokens: int = 1_000_000
    steps: int | None = None
    batch_tokens: int | list[Any] = 4096
    init_optimizer: InitOptimizer = "reset"
    guard: GuardSettings = GuardSettings()
    distill: DistillSettings = DistillSettings()
    loss_chunk: int | None = 2048
    span_tokens: int | None = None
    span_gradient: SpanGradient = "exact"
    balance_weight: float = 0.01
    z_weight: float = 0.0
    mtp_weight: float = 0.3
    index_weight: float = 1.0
    clip: float = 1.0
    clip_each: float | None = None
    clip_value: float | None = None
    average: AverageKind = "none"
    average_tokens: int | None = None
    average_count: int = 5
    init_weights: InitWeights = "raw"
    evaluate_every: int | None = None
    evaluate_tokens: int | None = None
    checkpoint_every: int | None = None
    checkpoint_async: bool = True
    keep: int = 2
    mfu: bool = True

    def __post_init__(self) -> None:
        for name in ("tokens", "clip", "keep"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be above 0")
        Ramp.of(self.batch_tokens)
        for name in ("steps", "loss_chunk", "span_tokens", "evaluate_every", "evaluate_tokens", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name}={value}: must be at least 1, or null")
        for name in ("clip_each", "clip_value", "average_tokens", "average_count"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"train.{name}={value}: must be above 0")
        if self.average not in AVERAGES:
            raise ValueError(f"train.average={self.average}: must be one of {', '.join(AVERAGES)}")
        if self.init_weights not in INIT_WEIGHTS:
            raise ValueError(f"train.init_weights={self.init_weights}: must be one of {', '.join(INIT_WEIGHTS)}")
        for name in ("balance_weight", "z_weight", "mtp_weight", "index_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: must not be negative")
        if self.span_gradient not in SPAN_GRADIENTS:
            raise ValueError(f"train.span_gradient={self.span_gradient}: must be one of {', '.join(SPAN_GRADIENTS)}")
        if self.init_optimizer not in INIT_OPTIMIZER:
            raise ValueError(f"train.init_optimizer={self.init_optimizer}: must be one of {', '.join(INIT_OPTIMIZER)}")

    @property
    def ramp(self) -> Ramp:
        """The tokens of each step; a single number holds for all."""
        return Ramp.of(self.batch_tokens)

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else self.ramp.steps(self.tokens)

    @property
    def total_tokens(self) -> int:
        return self.ramp.before(self.total_steps)

    def reached(self, facts: dict[str, Any]) -> int:
        """Returns a checkpoint's place in the budget, from its manifest: padding has a place in steps, and no
        tokens."""
        tokens = int(facts.get("tokens", 0))
        return tokens if self.steps is None else int(facts.get("places", tokens))

    def steps_at(self, filled: float) -> int:
        """Estimates the steps of the budget where this share of a step's places holds tokens."""
        return self.total_steps if self.steps is not None else max(self.total_steps, round(self.total_steps / filled))

    def complete(self, step: int, tokens: int) -> bool:
        """True for a run that has used its budget up. Steps with padding bring fewer tokens, so that it
        takes more of them."""
        return step >= self.total_steps and (self.steps is not None or tokens >= self.total_tokens)


MOST_WORKERS, MOST_THREADS = 1 << 17, 1024  # of a worker
LONGEST_S = 30 * 24 * 3600  # that anything may be waited for
ClusterKind = Literal["none", "local", "ray"]
KINDS = get_args(ClusterKind)
DeviceKind = Literal["auto", "cpu", "cuda"]
DEVICES = get_args(DeviceKind)


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """Machines, processes and devices of the workers.

    kind: none (spawned here), local (a Ray started here) or ray (one that runs already, at `address`). workers:
    processes that train, on all machines together: one a GPU or, on CPUs, one a core. threads: CPU threads of each
    worker; null for its machine's cores divided among the workers there. device: device of the workers' computation;
    auto is cuda where every worker has a GPU to itself, cpu elsewhere. address: address of the Ray; http://HOST:PORT
    (its dashboard, from anywhere) hands the run over as a job, `auto` or HOST:PORT joins it from one of its machines;
    null for the value of RAY_ADDRESS, else http://127.0.0.1:8265. restarts: new attempts from the last checkpoint
    after a worker or a machine is lost. timeout: seconds without a sign of life after which a worker counts as stuck,
    which ends the run; null for 20 median steps, at least a minute. A live worker may take ten minutes at least for the
    first two steps and for a checkpoint; a frozen one is found within `timeout` in a checkpoint, and within a minute at
    least before (two where null). template: the machines to start, for `farspan template`; null for none.
    """

    kind: ClusterKind = "local"
    workers: int = 2
    threads: int | None = None
    device: DeviceKind = "auto"
    address: str | None = None
    restarts: int = 0
    timeout: float | None = None
    template: Any = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"cluster.kind={self.kind}: must be one of {', '.join(KINDS)}")
        if self.device not in DEVICES:
            raise ValueError(f"cluster.device={self.device}: must be one of {', '.join(DEVICES)}")
        if not 1 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"cluster.workers={self.workers}: must be at least 1, and at most {MOST_WORKERS:,}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(
                f"cluster.threads={self.threads}: must be at least 1 and at most {MOST_THREADS:,}, or null"
            )
        if self.template is not None and not isinstance(self.template, dict):
            raise ValueError(
                f"cluster.template={self.template}: must be null, or come with cluster=slurm, kuberay or ray_up"
            )
        if self.restarts < 0:
            raise ValueError(f"cluster.restarts={self.restarts}: must not be negative")
        if self.timeout is not None and not 0 < self.timeout <= LONGEST_S:
            raise ValueError(
                f"cluster.timeout={self.timeout:g}: must be above 0 and at most {LONGEST_S:,} seconds, or null"
            )


_EVALUATED = {"tokens": (1, 1 << 40), "depths": (1, 1024), "samples": (1, 1 << 16), "symbols": (4, 1 << 20)}
_EVALUATED |= {"pairs": (1, 1 << 20), "documents": (1, 1 << 20), "beyond": (2, 1 << 20)}
PARTS = ("loss", "positions", "needle", "recall", "copy", "long_range", "extrapolation")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Measurements of `farspan evaluate` on held-out documents and on generated examples; training reads none of these
    keys.

    parts: some of loss (of each source, and by the length of documents), positions (the loss by the number of tokens
    before a target), needle (a pass key in a text, by depth and length, 2305.16300), recall (pairs of keys and values,
    2312.04927), copy (a sequence said again, 2402.01032), long_range (the gain from the text before the last `context`
    tokens) and extrapolation (the loss beyond the trained length, where a recurrent state may collapse, 2410.07145).
    length: tokens of a document to read, at most, and of the longest needle; null for data.max_length. tokens: tokens
    of held-out documents to score of each source, about. lengths: lengths of needle, recall and copy examples, in
    tokens; null for four, each twice the one before, up to `length`. depths: number of places of a needle, evenly
    spread from the first to the last. samples: examples of each length, and of each depth of a needle. symbols: number
    of different tokens in recall and copy. pairs: number of keys and values in a recall example. context: tokens that
    long_range leaves of the context. documents: documents of each length that long_range reads, and extrapolation, at
    most. beyond: length that extrapolation reads, in multiples of the trained length, at least 2. span_tokens: tokens
    of a text that a rank reads at a time, at most, as train.span_tokens; null for no limit. weights: raw, the trained
    ones, or average, those of train.average. tasks: tasks of lm-eval, where that is installed. limit: examples of each
    of these tasks; null for all.
    """

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    length: int | None = None
    tokens: int = 262_144
    lengths: list[int] | None = None
    depths: int = 5
    samples: int = 8
    symbols: int = 32
    pairs: int = 8
    context: int = 1024
    documents: int = 16
    beyond: int = 4
    span_tokens: int | None = None
    weights: InitWeights = "raw"
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"evaluate.parts={part}: must be one of {', '.join(PARTS)}")
        if self.weights not in INIT_WEIGHTS:
            raise ValueError(f"evaluate.weights={self.weights}: must be one of {', '.join(INIT_WEIGHTS)}")
        if not self.parts and not self.tasks:
            raise ValueError("evaluate.parts=[]: must name a part, or evaluate.tasks a task")
        for name, (least, most) in _EVALUATED.items():
            if not least <= (value := getattr(self, name)) <= most:
                wrong = f"at least {least}" if value < least else f"at most {most:,}"
                raise ValueError(f"evaluate.{name}={value}: must be {wrong}")
        if self.context < 8:
            raise ValueError(f"evaluate.context={self.context}: must be at least 8")
        for name in ("length", "span_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluate.{name}={value}: must be at least 1, or null")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise ValueError(f"evaluate.lengths={self.lengths}: must be lengths from 1, or null")


ComputeDtype = Literal["auto", "bf16", "fp32", "fp64"]
COMPUTE = get_args(ComputeDtype)


RecipeName = Literal[
    "none",
    "fp8_tensorwise",
    "fp8_delayed",
    "fp8_rowwise",
    "fp8_rowwise_wide",
    "fp8_blockwise",
    "mxfp8",
    "int8",
    "int8_weights",
    "int4_weights",
]
ProductKernel = Literal["auto", "emulated", "native"]
ScaleSpan = Literal["rank", "sequence"]
WeightGather = Literal["high", "codes"]
MasterWeights = Literal["high", "bf16"]


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    """The dtypes of computation and of weights, and formats of few bits in which linear layers multiply.

    compute: the dtype of matmuls; auto is bf16 where the device multiplies it natively, fp32 elsewhere. masters: the
    dtype of master weights, those that the optimizer changes. high: fp32, or fp64 when computing in fp64 (to compare
    layouts); bf16: that of layers that may follow a recipe is bf16, each update rounded up or down at random, the
    likelier the nearer, so that small ones are not lost; all else stays high, as gradients do. recipe: formats of the
    three products of a linear layer, forward and backward; none leaves them in `compute`. docs/precision.md has each.
    kernel: the way of products in a recipe; native: the device's own products of codes; emulated: values rounded as the
    format has them, multiplied in `compute` or fp32; auto: native on a GPU that has them, else emulated. scales: tokens
    that share a scale, where scales span tokens; rank: those of a rank, so that the loss depends on the layout;
    sequence: those of all ranks that share a sequence, for a message more a product. gather: form in which ranks gather
    sharded weights of layers that follow the recipe. high: as they are, and each rank makes codes; codes: a byte a
    number, a quarter of fp32's bytes, and the same codes, with recipes that read a weight as the same codes in both
    products: fp8_tensorwise, fp8_blockwise, int8_weights and int4_weights. high: patterns of layers' names, * for any
    text, that follow neither a recipe nor masters, besides those that the policy keeps so: the head, routers, and all
    that makes decays, gates and writing strengths. low: patterns of layers that follow against the policy. report: true
    has `farspan plan` run the model once, on this machine, and print how far a recipe rounds each layer, and its gain;
    training does not read it.
    """

    compute: ComputeDtype = "auto"
    masters: MasterWeights = "high"
    recipe: RecipeName = "none"
    kernel: ProductKernel = "auto"
    scales: ScaleSpan = "rank"
    gather: WeightGather = "high"
    high: list[str] = field(default_factory=list)
    low: list[str] = field(default_factory=list)
    report: bool = False

    def __post_init__(self) -> None:
        for key, accepted in (
            ("masters", MasterWeights),
            ("recipe", RecipeName),
            ("kernel", ProductKernel),
            ("scales", ScaleSpan),
            ("gather", WeightGather),
        ):
            if (value := getattr(self, key)) not in get_args(accepted):
                raise ValueError(f"precision.{key}={value}: must be one of {', '.join(get_args(accepted))}")
        if self.compute not in COMPUTE:
            raise ValueError(f"precision.compute={self.compute}: must be one of {', '.join(COMPUTE)}")
        if self.recipe == "none":
            if self.gather != "high":
                raise ValueError(
                    f"precision.gather={self.gather}: must be high without a recipe (precision.recipe=none)"
                )
            for key in ("high", "low"):
                if self.masters == "high" and (several := getattr(self, key)):
                    raise ValueError(f"precision.{key}={several}: must be [] without a recipe (precision.recipe=none)")


def section(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """A settings object from its part of the resolved configuration."""
    values = dict(values)
    if kind is ParallelSettings and "transport" in values:
        values["transport"] = TransportSettings(**values["transport"])
    if kind is ParallelSettings and isinstance(values.get("machine"), dict):
        values["machine"] = MachineSettings(**values["machine"])
    if kind is TrainSettings and isinstance(values.get("guard"), dict):
        values["guard"] = GuardSettings(**values["guard"])
    if kind is TrainSettings and isinstance(values.get("distill"), dict):
        values["distill"] = DistillSettings(**values["distill"])
    return kind(**values)
