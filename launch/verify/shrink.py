"""A run's configuration, small enough to be run in seconds: every kind of layer and every option of its layout stay.

A size is cut where cutting it changes no kind of work: layers to one of each kind, heads to four, experts to four,
widths to what the heads divide. Ratios stay that decide on another path: grouped heads stay grouped, heads that a size
of the mesh divides stay divided by it, a window still ends before a document does. The constructors judge: the first
width that the model is built with is taken.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from launch.config.model import model_of
from launch.errors import UserError
from parallel.schedule.mesh import Mesh
from train.run_config import ObjectConfig, RunConfig
from train.settings import GuardSettings, PrecisionSettings

MOST = 8  # processes that are spawned; of a larger mesh each size above 1 becomes 2
WIDTHS = (32, 48, 64, 96, 128, 192, 256)  # of the residual stream, the first that fits
VOCABULARY = 64
CAPS = {"hidden": 32, "shared_hidden": 16, "state": 8, "rank": 4, "chunk": 16, "window": 20, "sinks": 3}
CAPS |= {"mix_rank": 4, "decay_rank": 8, "rate_rank": 8, "value_rank": 8, "gate_rank": 8, "head_dim": 16}
TOKENS = 16  # of a tile, of a chunk of the loss
QUANTUM = 4  # tokens
CLIP = 0.05  # a norm that gradients exceed, so that clipping acts


@dataclass(frozen=True)
class Shrunk:
    """config: the small run. sizes: of its mesh, by axis. notes: what differs from the run that was asked about, a line
    each."""

    config: RunConfig
    sizes: dict[str, int]
    notes: tuple[str, ...]


PIPELINE = {"pipeline_schedule": "1f1b", "pipeline_layers": None, "stages_per_rank": 1}  # keys of one, as without it


def with_sizes(config: RunConfig, sizes: Mapping[str, int]) -> RunConfig:
    """The same run on another mesh."""
    mesh = Mesh(**sizes)
    own: dict[str, Any] = mesh.sizes
    if mesh.pipeline == 1:
        own |= {key: value for key, value in PIPELINE.items() if hasattr(config.parallel, key)}
    parallel = replace(config.parallel, **own)
    return replace(config, parallel=parallel, cluster=replace(config.cluster, workers=mesh.world))


def shrink(config: RunConfig) -> Shrunk:
    """The small run. Raises ValueError for sizes that do not fit, and for a model of which no small one is built."""
    mesh_asked = mesh = config.parallel.mesh(config.cluster.workers)
    notes = list[str]()
    if mesh.world > MOST:
        mesh = Mesh(**{axis: min(size, 2) for axis, size in mesh_asked.sizes.items()})
        notes.append(f"mesh {mesh_asked}: verified as {mesh}")
    sizes = mesh.sizes
    stages = mesh.pipeline * getattr(config.parallel, "stages_per_rank", 1)
    if getattr(config.parallel, "pipeline_layers", None) is not None:
        own: dict[str, Any] = {"pipeline_layers": None}
        config = replace(config, parallel=replace(config.parallel, **own))
        notes.append("parallel.pipeline_layers: says nothing of a small model; verified with stages of equal work")
    model, lines = _model(config.model.values, sizes, stages)
    notes += lines
    pieces = 2 * sizes["sequence"]
    length = max(48, 12 * pieces)
    accumulated = config.scheduler.get("tokens_per_rank") is not None
    groups = mesh.split[0]
    data = {
        "_target_": "train.verify.EdgeCases",
        "vocabulary": model["vocabulary"],
        "length": length,
        "sequences": max(5, groups + 1) if mesh.pipeline == 1 else 2 * mesh.pipeline * groups,
        "pieces": pieces,
        "equal": config.scheduler.get("layout") == "zigzag" or mesh.pipeline > 1,
    }
    train = config.train
    if train.span_gradient == "truncated" and train.span_tokens is not None:
        notes.append("train.span_gradient=truncated: depends on the layout; verified as exact")
    train = replace(
        train,
        steps=100,
        batch_tokens=length,
        loss_chunk=train.loss_chunk and TOKENS,
        span_tokens=train.span_tokens and max(1, length // sizes["sequence"] // 3),
        span_gradient="exact",
        clip=min(train.clip, CLIP),
        clip_each=train.clip_each and min(train.clip_each, CLIP / 2),
        clip_value=train.clip_value and min(train.clip_value, CLIP / 50),
        average="none",
        mfu=False,
        init_weights="raw",
        init_optimizer="reset",
        guard=GuardSettings(),
        evaluate_every=None,
        checkpoint_every=None,
    )
    engine = config.engine
    if engine.get("tile") is not None:
        engine = engine.having(tile=TOKENS)
    scheduler = config.scheduler
    if scheduler.get("quantum") is not None:  # of adaptive groups; speeds of ranks would make each run another
        scheduler = scheduler.having(quantum=QUANTUM, memory=None, stragglers=False)
    if accumulated or mesh.pipeline > 1:
        scheduler = scheduler.having(tokens_per_rank=-(-length // sizes["sequence"]))
    small = replace(
        config,
        model=ObjectConfig(model),
        data=ObjectConfig(data),
        curriculum=ObjectConfig({"_target_": "data.Curriculum"}),
        scheduler=scheduler,
        engine=engine,
        schedule=ObjectConfig({"_target_": "train.schedules.Constant", "warmup": 0}),
        precision=PrecisionSettings(compute="fp64"),
        parallel=replace(config.parallel, transport=replace(config.parallel.transport, keys="exact")),
        cluster=replace(config.cluster, kind="none", device="cpu", threads=1, address=None, template=None),
        tracking=ObjectConfig({"_target_": "train.tracking.Tracking", "mode": "disabled"}),
        optimizer=_optimizer(config.optimizer, model, config.model["dim"]),
        init_from=None,
        resume=None,
        stages=(),
        run=replace(config.run, name="verify", dir=None, plot=None, anew=False),
        train=train,
    )
    return Shrunk(with_sizes(small, sizes), sizes, tuple(notes))


def _optimizer(node: ObjectConfig, model: dict[str, Any], dim: int) -> ObjectConfig:
    """The same optimizer by a kernel that takes fp64. Transfer is to the small model, from as much smaller a base; the
    model's tied head follows."""
    if node.get("transfer") == "width":
        base = max(1, round(node["base_width"] * model["dim"] / dim))
        node = node.having(base_width=base)
        if model.get("tied"):
            model["tied_scale"] = base**0.5 / model["dim"]
    return node.having(fused="none") if node.get("fused") == "apex" else node


def _model(values: Mapping[str, Any], sizes: Mapping[str, int], stages: int) -> tuple[dict[str, Any], list[str]]:
    """The small model, and what had to change. Raises ValueError where none is built."""
    whole = model_of(values)
    notes: list[str] = []
    small = _layers(deepcopy(dict(values)), whole, stages)
    small["vocabulary"] = min(small["vocabulary"], VOCABULARY)
    best: Any = None
    for width in (*(w for w in WIDTHS if w < small["dim"]), small["dim"]):
        sized = _sized({**small, "dim": width}, sizes, notes if best is None else [])
        try:
            model_of(sized)
            return sized, notes
        except (UserError, ValueError) as error:
            best = error
    try:  # its widths as they are
        sized = {**small, "dim": values["dim"]}
        model_of(sized)
    except (UserError, ValueError):
        raise ValueError(f"model: no smaller one is built: {best}") from None
    notes.append("model: verified at its own widths; a smaller one is not built")
    return sized, notes


def _layers(values: dict[str, Any], whole: Any, stages: int) -> dict[str, Any]:
    """One layer of each kind, two where layers of a kind are coupled with each other; more where stages need some."""
    first = values.get("first_k_dense", 0)
    coupled = {
        kind
        for kind, layer in zip(whole.kinds, whole.layers.values(), strict=True)
        if getattr(layer, "couplings", ()) or getattr(layer, "hands", None)
    }
    chosen: list[tuple[str, bool]] = []
    for i, kind in enumerate(whole.kinds):
        key = kind, i < first
        if chosen.count(key) < (2 if kind in coupled else 1):
            chosen.append(key)
    cycle = [key for key in chosen if not key[1]] or chosen
    while len(chosen) < min(len(whole.kinds), max(2, stages)):
        chosen.append(cycle[len(chosen) % len(cycle)])
    chosen.sort(key=lambda key: not key[1])
    if "first_k_dense" in values:
        values["first_k_dense"] = sum(front for _, front in chosen)
    values["pattern"] = [kind for kind, _ in chosen]
    values["layers"] = len(chosen)
    return values


def _sized(node: Any, sizes: Mapping[str, int], notes: list[str]) -> Any:
    """An object of a model, its sizes cut."""
    if not isinstance(node, Mapping):
        return node
    sized = {key: _sized(value, sizes, notes) for key, value in node.items()}
    for key, cap in CAPS.items():
        if isinstance(value := sized.get(key), int) and value > cap:
            sized[key] = cap
    if isinstance(heads := sized.get("heads"), int):
        sized["heads"] = _divided(heads, 4, sizes)
        for key in ("kv_heads", "groups"):
            if isinstance(fewer := sized.get(key), int):
                sized[key] = sized["heads"] if fewer == heads else min(fewer, _divided(fewer, 2, sizes))
        if isinstance(more := sized.get("value_heads"), int):
            sized["value_heads"] = sized["heads"] * min(max(more // heads, 1), 2)
    if isinstance(experts := sized.get("num_experts"), int):
        sized["num_experts"] = _divided(experts, 4, sizes)
        sized["top_k"] = min(sized.get("top_k", 1), 2, sized["num_experts"])
        if sized.get("expert_groups", 1) > 1:
            sized["expert_groups"] = 2 if sized["num_experts"] % 2 == 0 and sized["num_experts"] >= 4 else 1
            sized["top_groups"] = min(sized.get("top_groups", 1), sized["expert_groups"])
    if (limit := sized.get("capacity_factor")) is not None:  # so much that no choice is dropped
        sized["capacity_factor"] = sized["num_experts"] / sized["top_k"]
        line = f"capacity_factor={limit:g}: depends on the layout; verified as {sized['capacity_factor']:g}"
        notes += [] if line in notes else [line]
    return sized


def _divided(count: int, cap: int, sizes: Mapping[str, int]) -> int:
    """The smallest number from `cap` on, at most `count`, that each size of the mesh divides where it divides
    `count`."""

    def same(n: int) -> bool:
        return all((n % size == 0) == (count % size == 0) for size in sizes.values())

    return next((n for n in range(min(cap, count), count) if same(n)), count)
