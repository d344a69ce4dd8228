"""`farspan plan`: what a run would do, without training: mesh, parameters, FLOPs, memory, traffic, the first plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster import nodes
from launch.cluster.nodes import room
from launch.cluster.placement import Node, place
from launch.commands import schedule_plot, template
from launch.commands.profile import measured
from launch.commands.simulate import simulated
from launch.errors import UserError
from launch.extend import stages
from launch.preflight.auto_layout import search_of, table
from launch.preflight.check import check_run, device_of
from launch.preflight.checked import CheckedRun
from launch.preflight.configure import configure
from launch.preflight.memory_fit import size_text
from launch.preflight.refusals import refusals
from launch.templates import Machines
from parallel.schedule import Adaptive
from train.run_config import RunConfig

if TYPE_CHECKING:  # torch is loaded once the configuration has been read
    from models.accounting import Account
    from models.lm import LM
    from parallel.schedule.plan import Plan


def plan(overrides: list[str]) -> int:
    """Prints the plan of a run. Raises UserError."""
    config = configure(overrides)
    if config.stages:
        print("\n".join(stages.table(*stages.legs(config, overrides))))
        return 0
    if steps := config.scheduler.get("simulate"):
        with refusals(config):
            print("\n".join(simulated(config, steps)))
        return 0
    if config.cost.profile:
        return measured(config)
    if config.parallel.auto:
        with refusals(config):
            described = config.parallel.machine.device is not None
            print("\n".join(table(search_of(config, "cuda" if described else device_of(config.cluster)))))
        return 0
    planned = _planned(config)
    with refusals(config):
        device = planned.device(config.cluster.device) if planned else None
    flight = check_run(config, print, device=device)
    with refusals(config):
        print("\n".join(lines(flight, planned.nodes_planned(flight.device) if planned else _nodes(flight))))
        if picture := config.run.plot:
            schedule_plot.draw(flight, Path(picture))
            print(f"picture     {picture}")
        if config.precision.report:
            print("\n".join(_precision(flight)))
        if steps := config.data.get("audit"):
            print("\n".join(_audit(flight, steps)))
    return 0


def _planned(config: RunConfig) -> Machines | None:
    """The machines of the cluster's template; None where there is none, or the cluster itself can be asked."""

    address = config.cluster.address
    rendered = template.machines(config)
    if rendered is None or address is None:
        return rendered
    try:
        nodes.check_answers(nodes.address_of(address))
    except UserError as error:
        print(f"{error}; planned on the machines of cluster.template")
        return rendered
    return None


def _nodes(flight: CheckedRun) -> list[Node]:
    if flight.cluster.kind != "ray":
        return [Node("this machine", "127.0.0.1", flight.cluster.workers)]

    return room(flight.cluster, flight.device)


def lines(flight: CheckedRun, nodes: list[Node]) -> list[str]:
    """The plan of a run on `nodes`. Raises ValueError when it does not fit them."""
    from train.engines.refusals import name_of, plain
    from train.metrics.timing import pieces
    from train.stages import lines as stages_of

    config, train = flight.config, flight.train
    placement = place(flight.cluster.workers, nodes, flight.sizes)
    model = _model(flight)
    batch, first, by = _first(flight, model)
    longest = max(first.lengths)
    costs = _costs(flight, model)
    spans = _spans(flight, first)
    read = [n for s in batch for n in pieces(s.starts[s.counted])]
    sizes = " to ".join(f"{size:,}" for size in sorted({train.ramp.sizes[0], train.ramp.sizes[-1]}))
    cut = "parameters" if plain(config) else f"engine={name_of(config)}: state"
    return [
        f"mesh        {flight.cluster.workers} workers on {flight.device}: {flight.layout}; {cut} sharded over "
        f"{'all' if flight.mesh.replicate == 1 else flight.mesh.world // flight.mesh.replicate} of them",
        *(f"{'' if i else 'placement':<12}{line}" for i, line in enumerate(placement.lines())),
        *(
            f"{'' if i else 'pipeline':<12}{line}"
            for i, line in enumerate(stages_of(config, model, flight.device, first))
        ),
        _budget(flight, sizes),
        *schedule_plot.lines(flight),
        *_transfer(flight, model),
        f"parameters  {costs.parameters:,}, of which {costs.activated:,} act on a token",
        *_flops(costs, read, config.engine.get("recompute", "none")),
        *_order(flight),
        *(f"{'' if i else 'layout':<12}{line}" for i, line in enumerate(_dependences(flight, model))),
        *_recipe(flight, model),
        *_memory(flight, model, costs, spans, first),
        f"state       {size_text(costs.state(longest))} to go on after {longest:,} tokens",
        *(_traffic(flight, model, first, batch) if spans == 1 else _traffic_in_time(flight)),
        *by,
        *first.text().splitlines(),
    ]


def _first(flight: CheckedRun, model: LM) -> tuple[list[Any], Plan, list[str]]:
    """The sequences of the first step, their plan, and lines about the costs that it is made by."""
    config, batch = flight.config, flight.batches.batch(flight.config.seed, 0)
    scheduler = config.scheduler.build()
    if not isinstance(scheduler, Adaptive):
        lengths = [len(s.tokens) for s in batch]
        return batch, scheduler.plan(0, lengths, data=flight.data, sequence=flight.sequence), []
    from data.pack import unpacked
    from train.step_costs import costs_of

    batch = unpacked(batch) if scheduler.documents else batch
    lengths = [len(s.tokens) for s in batch]
    costs, line = costs_of(
        config, scheduler, model, device=flight.device, mesh=flight.mesh, threads=flight.threads or 1
    )
    kind, packing = scheduler.pack(costs, lengths)
    by = [f"groups      {kind}; {line}"]
    return batch, packing.plan(0, lengths, flight.mesh.planned, scheduler.layout), by


def _budget(flight: CheckedRun, sizes: str) -> str:
    """The line about steps and tokens."""
    train, filled = flight.train, flight.batches.filled(flight.train.total_steps)
    if filled == 1:
        return f"budget      {train.total_steps:,} steps of {sizes} tokens = {train.total_tokens:,}"
    share = f"steps of {sizes} places, of which {1 - filled:.1%} are padding"
    if train.steps is not None:
        return f"budget      {train.steps:,} {share}"
    return f"budget      {train.total_tokens:,} tokens, in some {train.steps_at(filled):,} {share}"


def _order(flight: CheckedRun) -> list[str]:
    """Returns what a step may consist of, and the shares of all steps."""
    shapes = " | ".join(f"{len(lengths):,} x {lengths[0]:,}" for lengths in flight.batches.shapes())
    drawn = flight.batches.drawn(flight.train.total_steps)
    shares = [f"{name} {tokens / flight.train.total_tokens:.1%}" for name, tokens in drawn.items() if tokens]
    return [f"sequences   {shapes} a step", *([f"            {', '.join(shares)}"] if len(shares) > 1 else [])]


def _audit(flight: CheckedRun, steps: int) -> list[str]:
    """Raises ValueError for what the audit finds wrong."""
    from data.audit import audit, passed_over
    from train.checkpoints import checkpoint

    facts: dict[str, Any] = checkpoint.manifest(flight.resume) if flight.resume else {"step": 0, "skips": 0}
    try:
        report = audit(flight.batches, flight.config.seed, steps, facts["step"], facts["skips"])
        if flight.resume is not None:
            trained = {
                record["step"]: record["step"] - 1 + record.get("skips", 0) for record in _trained(flight.resume)
            }
            report.append(passed_over(facts.get("skipped", []), facts["step"], facts["skips"], trained))
    except AssertionError as error:
        raise ValueError(f"data.audit={steps}: {error}") from None
    return [f"{'' if i else 'audit':<12}{line}" for i, line in enumerate(report)]


def _trained(checkpoint: Path) -> list[dict[str, Any]]:
    """The records of the steps that a run has made, of which the newest attempt's count."""
    from train.tracking import records

    return [r for r in records(checkpoint.parent.parent / "metrics.jsonl") if "skipped" not in r]


def _model(flight: CheckedRun) -> LM:
    """On the meta device, computing in what the run would."""
    import torch

    from train.precision import dtypes

    with torch.device("meta"):
        model = flight.config.model.build()
    model.compute = dtypes(flight.config.precision.compute, flight.device)[0]
    model.loss_chunk = flight.train.loss_chunk
    return model


def _transfer(flight: CheckedRun, model: LM) -> list[str]:
    """Lines about the rates that width asks for; none without transfer."""
    from train.optim.transfer import lines as lines_of

    several = lines_of(flight.config.optimizer, model)
    return [f"{'' if i else 'transfer':<12}{line}" for i, line in enumerate(several)]


def _dependences(flight: CheckedRun, model: LM) -> list[str]:
    from train.layout import dependences

    return dependences(
        model, flight.train, flight.config.parallel.transport.keys, flight.config.engine.get("gradients", "high")
    )


def _recipe(flight: CheckedRun, model: LM) -> list[str]:
    """Lines about the recipe of linear layers; none without one."""
    from train.precision import follow
    from train.precision import lines as lines_of

    low, layers = follow(flight.config.precision, model, flight.device)
    several = lines_of(flight.config, layers, low, flight.device) if low else []
    return [f"{'' if i else 'precision':<12}{line}" for i, line in enumerate(several)]


def _precision(flight: CheckedRun) -> list[str]:
    """Lines of `precision.report=true`. Raises ValueError for a model too large to be run here."""
    from train.precision import layers_of
    from train.precision_report import report
    from train.rank_memory import layout_of

    settings, model = flight.config.precision, _model(flight)
    batch, first, _ = _first(flight, model)
    several = report(
        model,
        batch[0],
        recipe=settings.recipe,
        layers=layers_of(settings, model, flight.device),
        seed=flight.config.seed,
        tokens=layout_of(flight.config, model, flight.mesh, first, flight.device).tokens,
        device=flight.config.parallel.machine.device or "h100",
        checkpoint=flight.resume or flight.init_from,
    )
    return [f"{'' if i else 'rounding':<12}{line}" for i, line in enumerate(several)]


def _costs(flight: CheckedRun, model: LM) -> Account:
    """Raises ValueError for a model whose costs are not known."""
    from models.accounting import account

    try:
        return account(model, device=flight.device)
    except NotImplementedError as error:
        raise ValueError(f"model: {error}") from None


def _flops(costs: Account, documents: list[int], recompute: str) -> list[str]:
    """Lines about the FLOPs of the first batch, with its own documents: attention's work depends on their lengths."""
    flops, tokens = costs.flops(documents), sum(documents)
    attention = 1 - sum(costs.per_token[:2]) * tokens / flops.model
    again = f", again {_count(flops.recompute / tokens)} for what is recomputed" if recompute == "full" else ""
    return [
        f"FLOPs       a token {_count(flops.forward / tokens)} forward, {_count(flops.backward / tokens)} backward"
        f"{again}; a step {_count(flops.model)}",
        f"            {attention:.1%} of them are products of queries, keys and values in softmax attention",
    ]


def _spans(flight: CheckedRun, first: Plan) -> int:
    """Returns how many spans in time the longest micro-step takes."""
    from parallel.schedule.time_spans import count

    most = flight.train.span_tokens
    return 1 if most is None else max(count(micro, first.lengths, most) for micro in first.micro_steps)


def _memory(flight: CheckedRun, built: LM, costs: Account, spans: int, first: Plan) -> list[str]:
    """The peak of the fullest rank's tensors in a step, by what they are (`parallel.schedule.step_memory`)."""
    from parallel.schedule.step_memory import GATHERED
    from train.engines.refusals import plain
    from train.rank_memory import MemoryModel, layout_of

    memory = MemoryModel(flight.config, flight.device, exact=True)
    layout = layout_of(flight.config, built, flight.mesh, first, flight.device)
    parts = memory.parts(layout)
    if not plain(flight.config):  # ZeRO has a copy of its part of the weights, and whole what it does not cut
        zero, whole = flight.config.engine.get("zero", 1), float(costs.parameters * memory.master.itemsize)
        share = whole / (flight.mesh.data * flight.mesh.expert * flight.mesh.sequence)
        parts["copies of the engine"] = {1: 2 * whole - share, 2: whole, 3: share}[zero]
        if zero < 3:
            parts.pop(GATHERED, None)
    if spans > 1 and flight.train.span_gradient == "exact":
        parts[f"between {spans:,} spans in time"] = (spans - 1) * costs.state(layout.tokens * flight.sequence)
    step = "micro-step" if spans == 1 else "span in time"
    largest = sorted(parts.items(), key=lambda item: -item[1])
    all_parts = size_text(sum(parts.values()))
    return [
        f"memory      {all_parts} a rank at {layout.tokens:,} tokens a {step}, besides the runtime",
        *(f"            {size_text(value):>10}  {name}" for name, value in largest),
    ]


def _traffic_in_time(flight: CheckedRun) -> list[str]:
    return [] if flight.cluster.workers == 1 else ["traffic     of spans in time is not foretold: a run counts it"]


def _traffic(flight: CheckedRun, model: LM, first: Plan, batch: Any) -> list[str]:
    """Returns what ranks receive from others in the first step, by purpose, as the run's records will count it."""
    from collections import Counter

    from models.axes import declarations
    from parallel.schedule.comm_volume import How
    from train.engines.refusals import plain
    from train.metrics.width_trace import divided, of_step
    from train.optim.build import build_optimizer
    from train.precision import dtypes, gathered_weights

    transport, engine, workers = flight.config.parallel.transport, flight.config.engine, flight.cluster.workers
    if workers == 1:
        return []
    if not plain(flight.config):
        return ["traffic     of an engine other than fsdp is neither foretold nor counted but for sequences"]
    if flight.mesh.pipeline > 1:
        from train.stages import cuts, messages

        sent = messages(model, cuts(flight.config, model, flight.device), first, flight.mesh.tensor)
        return [f"traffic     {size_text(sent)} a step between stages; what else is sent in a pipeline, a run counts"]
    auto = transport.recurrence == "auto"
    how = How("gather" if auto else transport.recurrence, transport.attention, transport.blocks, keys=transport.keys)
    starts = [s.starts.nonzero()[0].tolist() for s in batch]
    master = dtypes(flight.config.precision.compute, flight.device)[1]
    traffic_of_step = of_step(
        lambda: _model(flight),
        flight.mesh,
        first,
        starts,
        how,
        itemsize=master.itemsize,
        reshard=engine.get("reshard_after_forward", True),
        recompute=engine.get("recompute", "none"),
        experts=transport.experts,
        device=flight.device,
        gradients=engine.get("gradients", "high"),
        coded=gathered_weights(flight.config.precision, model, flight.device),
    )
    total, most = Counter[str](), Counter[str]()
    declared, shapes = declarations(model), _model(flight)
    divided(shapes, flight.mesh.tensor, 0)
    stepping: Any = build_optimizer(flight.config.optimizer.build(), shapes, declared)
    matrices = hasattr(stepping, "received")
    more = stepping.received(flight.mesh, master, flight.device) if matrices else [None] * workers
    for by_axis, matrices in zip(traffic_of_step, more, strict=True):
        received = Counter[str]()
        for traffic in (*by_axis.values(), *([matrices] if matrices else [])):
            received.update(traffic.bytes)
        total.update(received)
        most |= received
    together = max(len(group.ranks) for micro in first.micro_steps for group in micro.groups)
    note = "; auto, as if it chose gather for states" if auto and together > 1 else ""
    note += (
        "" if transport.experts == "padded" or flight.mesh.expert == 1 else "; experts, as if each were chosen as often"
    )
    return [
        f"traffic     {size_text(total.total())} a step between {workers} ranks, by what it is, and the most a rank "
        f"receives{note}",
        *(
            f"            {size_text(n):>10}  {purpose}, {size_text(most[purpose])}"
            for purpose, n in total.most_common()
        ),
    ]


def _count(number: float) -> str:
    """Three digits and a prefix: 12.3 M."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or unit == "P":
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    raise AssertionError
