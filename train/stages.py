"""The stages of a run's pipeline: which layers each rank has, and whether the run can have them at all."""

from collections.abc import Sequence
from typing import NamedTuple

from models.accounting import account
from models.attnres import SUM
from models.lm import LM
from parallel.pipeline.cut import PipelineCut
from parallel.pipeline.orders import HALVES, bubble
from parallel.schedule.plan import Plan
from parallel.schedule.stages import check, cut, given
from train.run_config import RunConfig

LENGTH = 4096  # tokens of the documents by which layers are weighed where the configuration says nothing


class Work(NamedTuple):
    """The work of training on a token: FLOPs of each layer, and of the head; numbers of parameters where no FLOPs are
    known."""

    layers: tuple[float, ...]
    head: float


def work(model: LM, length: int, device: str) -> Work:
    """The work of a whole model on the meta device, on documents of `length` tokens. Embedding takes none."""
    try:
        costs = account(model, device=device)
    except NotImplementedError:
        sizes = tuple(float(sum(p.numel() for p in layer.parameters())) for layer in model.layers.values())
        return Work(sizes, float(model.embedding.numel()))
    ahead = sum(module.flops(length) for module in costs.ahead)  # which lies with the head
    return Work(tuple(layer.flops(length) for layer in costs.layers), costs.head + ahead)


def cuts(config: RunConfig, model: LM, device: str) -> tuple[range, ...]:
    """The layers of each stage. model: the whole, on the meta device. Raises ValueError for what cannot be cut so."""
    parallel, count = config.parallel, len(model.kinds)
    stages = parallel.stages
    if stages > count:
        key = f"parallel.pipeline={parallel.pipeline}"
        each = f", times parallel.stages_per_rank={parallel.stages_per_rank}" if stages > parallel.pipeline else ""
        raise ValueError(f"{key}{each}: makes {stages} stages, must make at most {count}, one a layer")
    if (own := parallel.pipeline_layers) is not None:
        if len(own) != stages or sum(own) != count or min(own) < 1:
            raise ValueError(
                f"parallel.pipeline_layers={list(own)}: must be {stages} numbers of layers, one a stage and each at "
                f"least 1, that make up {count}"
            )
        return given(own)
    costs = work(model, documents(config), device)
    return cut(costs.layers, stages, head=costs.head)


def documents(config: RunConfig) -> int:
    """The length of the documents by which layers are weighed, in tokens."""
    longest = config.data.get("max_length")
    return longest if isinstance(longest, int) else LENGTH


def pipeline_cut(config: RunConfig, model: LM, device: str) -> PipelineCut | None:
    """The layers of each pipeline rank, the same on every rank of the run; None without a pipeline."""
    if config.parallel.pipeline == 1:
        return None
    return PipelineCut.of(model, cuts(config, model, device), config.parallel.pipeline)


def messages(model: LM, cuts: Sequence[range], plan: Plan, tensor: int = 1) -> int:
    """Bytes that ranks receive of each other's activations and their gradients in a step, all ranks together.

    tensor: ranks that each send an equal share of the tokens.
    """
    spans = [held for micro in plan.micro_steps for group in micro.groups for held in group.spans]
    counts = [sum(end - begin for begin, end in held) or 1 for held in spans]  # an idle rank sends a masked one
    tokens = sum(tensor * -(-count // tensor) for count in counts)
    tensors = sum(model.passing(layers.start) for layers in cuts[1:])
    return 2 * tensors * tokens * model.dim * model.compute.itemsize


def lines(config: RunConfig, model: LM, device: str, plan: Plan) -> list[str]:
    """The stages for people: layers, shares of the work and of the parameters, the wait; [] without a pipeline."""
    stages, parallel = pipeline_cut(config, model, device), config.parallel
    if stages is None:
        return []
    costs, sizes = work(model, documents(config), device), {n: p.numel() for n, p in model.named_parameters()}
    shares = [sum(costs.layers[i] for i in layers) for layers in stages.cuts]
    shares[-1] += costs.head
    name, ranks, steps = parallel.pipeline_schedule, parallel.pipeline, len(plan.micro_steps)
    waits = bubble(name, ranks, [(share, 2 * share) for share in shares], steps)
    lines = [f"{name} over {ranks} ranks, {steps} micro-steps in the first step: ranks wait {waits:.1%} of it"]
    for s, (layers, share) in enumerate(zip(stages.cuts, shares, strict=True)):
        ends = ["embedding"] * (s == 0), ["head"] * (s == len(shares) - 1)
        parts = ", ".join([*ends[0], f"layers {layers.start} to {layers.stop - 1}", *ends[1]])
        lines.append(f"stage {s} on rank {s % ranks}: {parts}, {share / sum(shares):.1%} of the work")
    held = [sum(size for n, size in sizes.items() if rank in stages.holders[n]) for rank in range(ranks)]
    lines.append(f"parameters a rank: {', '.join(f'{count:,}' for count in held)}")
    return lines


def refuse(config: RunConfig, model: LM, device: str, plans: Sequence[Plan]) -> None:
    """Raises ValueError for a pipeline that cannot be, or cannot run these plans. model: the whole, on the meta
    device."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        for key, without in (("stages_per_rank", 1), ("pipeline_layers", None)):
            if (value := getattr(parallel, key)) != without:
                must = "null" if without is None else without
                raise ValueError(f"parallel.{key}={value}: must be {must} with parallel.pipeline=1")
        return
    crossing = sorted({name for layers in cuts(config, model, device)[1:] for name in model.crossing(layers.start)})
    handed = [name for name in crossing if not name.startswith(SUM)]  # of which ranks have shares of the tokens
    if not config.scheduler.target.endswith(".Static"):
        name = config.scheduler.target.rpartition(".")[2].lower()
        raise ValueError(
            f"scheduler={name}: must be static with parallel.pipeline={parallel.pipeline}: its sequence groups change "
            "from micro-step to micro-step"
        )
    if parallel.pipeline_schedule in HALVES and config.engine.get("recompute") == "selective":
        raise ValueError(
            f"engine.recompute=selective: must be none or full with parallel.pipeline_schedule="
            f"{parallel.pipeline_schedule}: each half of a backward pass computes a layer again, which keeps its "
            "results for once"
        )
    streams = None if model.hyper is None else model.hyper.streams
    several = {"attnres_block": model.depths[0].attnres_block, "hyper_connections": streams}
    if parallel.pipeline_schedule in HALVES and (found := [k for k, value in several.items() if value is not None]):
        raise ValueError(
            f"parallel.pipeline_schedule={parallel.pipeline_schedule}: must be 1f1b or interleaved with "
            f"model.{found[0]}={several[found[0]]}: half a backward pass does not reach streams that it takes apart"
        )
    if parallel.pipeline_schedule in HALVES and model.mtp_layers:
        raise ValueError(
            f"parallel.pipeline_schedule={parallel.pipeline_schedule}: must be 1f1b or interleaved with "
            f"model.mtp_layers={model.mtp_layers}: half a backward pass does not reach an embedding that the last "
            "stage reads"
        )
    if parallel.tensor > 1 and handed:
        raise ValueError(
            f"parallel.tensor={parallel.tensor}: must be 1 with parallel.pipeline={parallel.pipeline}: stages hand on "
            f"{handed[0]}, of which each tensor rank has channels of its own"
        )
    if config.train.span_tokens is not None:
        raise ValueError(
            f"train.span_tokens={config.train.span_tokens}: must be null with parallel.pipeline={parallel.pipeline}"
        )
    for plan in plans:
        check(plan, parallel.pipeline_schedule, parallel.pipeline)
