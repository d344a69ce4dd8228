"""The model of a run on its ranks: built on no device, cut and sharded by the engine, with its optimizer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from models.accounting import account
from models.lm import LM
from models.moe import mixtures
from models.nonlinear_recurrence import Serial
from models.recipes import LowPrecision
from parallel.expert import pad
from parallel.mesh import Meshes
from parallel.pipeline.cut import PipelineCut
from parallel.pipeline.runner import Pipeline
from parallel.schedule.comm_volume import Ask
from train.compile_choice import compile_layers
from train.distill import Teacher, place_teacher
from train.layout import dependences
from train.metrics.comm_trace import asked
from train.metrics.timing import PhaseTimes, Utilisation, matmul_peak
from train.optim.transfer import start_for_width
from train.precision import dtypes, follow, lines
from train.run_config import RunConfig
from train.stages import pipeline_cut


class PlacedModel(NamedTuple):
    """A rank's part of a model, and what is known of the whole.

    experts: by layer, the experts of all stages of a pipeline, {} without one; limited: those layers whose experts have
    a capacity. asks: what a transport is to be chosen for. utilisation: on rank 0, where a model's costs are known.
    counts: parameters of the whole, by what they are counted for. low: the recipe that linear layers follow, or None.
    teacher: the model that the run learns from, or None.
    """

    model: LM
    optimizer: Optimizer
    pipeline: Pipeline | None
    experts: dict[str, int]
    limited: list[str]
    asks: Sequence[Ask]
    utilisation: Utilisation | None
    counts: dict[str, int]
    low: LowPrecision | None = None
    teacher: Teacher | None = None


def place_model(order: dict[str, Any], meshes: Meshes, phases: PhaseTimes, say: Callable[[str], None]) -> PlacedModel:
    """Places the model of the run that is ordered (`train.build.build`) on the ranks of its meshes. Collective."""
    config: RunConfig = order["config"]
    compute, master = dtypes(config.precision.compute, meshes.device.type)
    with torch.device("meta"):
        model = config.model.build()
    start_for_width(config.optimizer, model)
    model.compute = compute
    _announce(model, config, say)
    asks = _asks(model, config, order["device"])
    counted = dist.get_rank() == 0 and config.train.mfu
    utilisation = _utilisation(model, order["device"], say) if counted else None
    cut, counts = pipeline_cut(config, model, order["device"]), _counts(model, utilisation)
    experts = mixtures(model) if cut is not None else {}
    low, layers = follow(config.precision, model, order["device"])
    for line in lines(config, layers, low, order["device"]) if low else ():
        say(line)
    teacher = place_teacher(config, model, meshes)
    compile_layers(config, model, meshes.device, say)
    engine, make = config.engine.build(), config.optimizer.build()
    optimizer = engine.build(model, meshes, make, seed=config.seed, dtype=master, cut=cut)
    if config.parallel.transport.experts == "padded":
        pad(model)
    pipeline = None if cut is None else _pipeline(config, model, cut, meshes, phases)
    return PlacedModel(
        model,
        optimizer,
        pipeline,
        {name: moe.num_experts for name, moe in experts.items()},
        [name for name, moe in experts.items() if moe.capacity_factor is not None],
        asks,
        utilisation,
        counts,
        low,
        teacher,
    )


def _announce(model: LM, config: RunConfig, say: Callable[[str], None]) -> None:
    """Says what of the model keeps a run from having the same loss on every layout, or from its transport."""
    for line in dependences(
        model, config.train, config.parallel.transport.keys, config.engine.get("gradients", "high")
    ):
        say(line)
    declared = (getattr(module, "recurrence", None) for module in model.modules())
    for rule in sorted({each.rule for each in declared if isinstance(each, Serial)}):
        say(f"parallel.transport.recurrence: the state of {rule} is relayed, whatever is chosen: no span has an effect")


def _asks(model: LM, config: RunConfig, device: str) -> tuple[Ask, ...]:
    """Returns what a transport is chosen for, where one is to be; none of it where the model's shapes depend on
    data."""
    if config.parallel.transport.recurrence != "auto":
        return ()
    try:
        return asked(model, device=device)
    except NotImplementedError:
        return ()


def _utilisation(model: LM, device: str, say: Callable[[str], None]) -> Utilisation | None:
    """Returns what steps' FLOP/s are held against: plain matmuls on as many devices as rank 0's. None where a model's
    costs are not known."""
    try:
        costs = account(model, device=device)
    except NotImplementedError as error:
        say(f"model_flops and mfu are not known: {' '.join(str(error).split())[:200]}")
        return None
    return Utilisation(costs, matmul_peak(device, model.compute) * dist.get_world_size())


def _counts(model: LM, utilisation: Utilisation | None) -> dict[str, int]:
    """Returns how many parameters a whole model has."""
    counts = {"total": sum(p.numel() for p in model.parameters()), "embedding": model.embedding.numel()}
    return counts | ({"activated": utilisation.account.activated} if utilisation else {})


def _pipeline(config: RunConfig, model: LM, cut: PipelineCut, meshes: Meshes, phases: PhaseTimes) -> Pipeline:
    return Pipeline(
        model,
        cut,
        config.parallel.pipeline_schedule,
        meshes,
        phase=phases,
        reshard_after_forward=config.engine.get("reshard_after_forward", True),
    )
