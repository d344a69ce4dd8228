"""Everything about a run that can be refused before a process starts, checked in the order a person would fix it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.cluster import nodes
from launch.cluster.find_run import run_folder
from launch.config.model import model_of
from launch.preflight import continuation, init_from
from launch.preflight.auto_layout import with_layout
from launch.preflight.checked import CheckedRun, cores
from launch.preflight.corpus import open_batches
from launch.preflight.distill import with_teacher
from launch.preflight.engine import check_engine
from launch.preflight.layout import check_layout
from launch.preflight.memory_fit import check_memory
from launch.preflight.refusals import refusals
from launch.run.rundir import is_checkpoint, latest, locked
from parallel.schedule import Adaptive
from train.run_config import RunConfig
from train.settings import ClusterSettings

MOST_A_CORE = 32  # processes without Ray: more would only wait for each other
MOST_SEQUENCES = 1 << 15  # of a step: what a plan and a batch take seconds for


def check_run(
    config: RunConfig, say: Callable[[str], None], *, device: str | None = None, data_here: bool = True
) -> CheckedRun:
    """Checks the whole run and returns it ready to start, its configuration settled. Raises UserError with one line.

    device: that of the workers, where it is known already. data_here: whether the corpus and the checkpoints can be
    read from this machine; where not, what needs them is left unchecked, and the run has no batches.
    """
    from train.precision import check_recipe
    from train.tracking import obey_environment

    with refusals(config):
        config = replace(config, tracking=obey_environment(config.tracking))
        train, cluster, compute = config.train, config.cluster, config.precision.compute
        if config.stages:
            raise ValueError("stages: must be [] but for `farspan train` and `farspan plan`, on this machine")
        if override := config.convert.override:
            raise ValueError(f"{override}: must be null without stages")
        if config.seed < 0:
            raise ValueError(f"seed={config.seed}: must not be negative")
        device = device or device_of(cluster)
        if config.parallel.auto:
            config = with_layout(config, device, say)
        if cluster.kind == "local" and device == "cpu" and cluster.workers > cores():
            raise ValueError(f"cluster.workers={cluster.workers}: this machine has {cores()} cores, a worker takes one")
        if cluster.kind != "ray" and (cluster.threads or 0) > cores():
            raise ValueError(f"cluster.threads={cluster.threads}: must be at most {cores()}, this machine's cores")
        if cluster.kind == "none" and cluster.workers > (most := MOST_A_CORE * cores()):
            raise ValueError(f"cluster.workers={cluster.workers}: must be at most {most}, {MOST_A_CORE} a core")
        mesh = config.parallel.mesh(cluster.workers)
        data, sequence = mesh.split
        model = model_of(config.model.values)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        check_engine(config, mesh, device)
        _optimizer(config, device, model)
        check_layout(config, mesh, model)
        config = with_teacher(config, model, here=data_here)
        check_recipe(config, model, device)
        _bases(config, model)
        _stages(config, device)
        if not data_here:
            _objects(config, data, sequence)
            return CheckedRun(config, device, mesh, shapes, None)
        if isinstance(longest := config.data.get("max_length"), int):
            _few_enough(config, max(train.ramp.sizes) // max(longest, 1))
        batches = open_batches(config, shapes["embedding"][0], say)
        _few_enough(config, max(map(len, batches.shapes())))
        steps = train.steps_at(batches.filled(train.total_steps))
        batches.batch(config.seed, steps - 1)  # there is enough for all steps
        _objects(config, data, sequence, batches.shapes())
        flight = CheckedRun(config, device, mesh, shapes, batches)
        _fitting(flight, model)
        _stages(config, device, batches.shapes())
        if compute == "bf16" and device == "cpu":
            _warn_without_bf16(say)
        lengths = min(batches.shapes(), key=len)
        if len(lengths) < data:
            say(
                f"train.batch_tokens={sum(lengths)}: a step has {len(lengths)} sequences of {lengths[0]:,} "
                f"tokens for parallel.data={data} groups: the others will idle"
            )
        check_memory(flight)
        checked = _with_checkpoints(flight, say)
        return continuation.settled(checked, say)


def _few_enough(config: RunConfig, sequences: int) -> None:
    """Raises ValueError for a step of more sequences than a plan can be made for in seconds."""
    if sequences > MOST_SEQUENCES:
        raise ValueError(
            f"train.batch_tokens={config.train.batch_tokens}: makes {sequences:,} sequences a step; "
            f"must make at most {MOST_SEQUENCES:,}"
        )


def _bases(config: RunConfig, model: Any) -> None:
    """A rotary base that nothing turns by would be ignored without a word."""
    from train.rope_base import rotary

    context = config.curriculum.build().context or ()
    if any(base is not None for _, _, base in context) and not rotary(model):
        stages = [list(stage) for stage in context]
        raise ValueError(f"curriculum.context={stages}: names a rotary base, and no layer has rotary positions")


def device_of(cluster: ClusterSettings) -> str:
    if cluster.kind == "ray":
        return nodes.device(cluster.device, cluster.workers, nodes.address_of(cluster.address))
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cluster.device == "cuda" and count < cluster.workers:
        has = f"{count} CUDA devices for {cluster.workers} workers" if count else "no CUDA device"
        raise ValueError(f"cluster.device=cuda: this machine has {has}; accepts auto or cpu")
    return "cuda" if cluster.device == "cuda" or cluster.device == "auto" and count >= cluster.workers else "cpu"


def _objects(config: RunConfig, data: int, sequence: int, batches: list[list[int]] | None = None) -> None:
    """Builds what is cheap to build, so that its own checks speak now, asks for a rate, and for plans of `batches`."""
    for node in (config.engine, config.tracking):
        node.build()
    scheduler = config.scheduler.build()
    for lengths in batches or ():
        plan = scheduler.plan(0, lengths, data=data, sequence=sequence)
        plan.check(data * sequence)
        shared = [sum(lengths[s] for s in group.sequences) for micro in plan.micro_steps for group in micro.groups]
        if sequence > max(shared):
            raise ValueError(
                f"parallel.sequence={sequence}: must be at most {max(shared)}, the tokens that such a group of ranks "
                "has to share"
            )
    if batches is None:
        config.data.build()
        config.curriculum.build()
    config.schedule.build().check(config.train.total_tokens, max(config.train.ramp.sizes))


def _fitting(flight: CheckedRun, model: Any) -> None:
    """Raises ValueError where adaptive groups cannot hold the longest sequence that a step may have, or the plan is to
    choose what is computed again and none does."""
    config, batches = flight.config, flight.batches
    scheduler = config.scheduler.build()
    if config.engine.get("recompute") == "planned":
        if not isinstance(scheduler, Adaptive):
            raise ValueError("engine.recompute=planned: must come with scheduler=adaptive or scheduler=auto")
        if flight.mesh.expert > 1:  # groups that meet in their experts' messages would repeat them unequally
            raise ValueError(f"engine.recompute=planned: must come with parallel.expert=1, not {flight.mesh.expert}")
    if not isinstance(scheduler, Adaptive):
        return
    from train.precision import dtypes
    from train.step_costs import check_fits, costs_of

    model.compute = dtypes(config.precision.compute, flight.device)[0]
    longest = max(map(max, batches.shapes()))
    if scheduler.documents:
        longest = min(longest, getattr(batches, "longest_piece", longest))
    costs, _ = costs_of(config, scheduler, model, device=flight.device, mesh=flight.mesh, threads=flight.threads or 1)
    check_fits(scheduler, costs, longest)


def _optimizer(config: RunConfig, device: str, model: Any) -> None:
    """Builds it for one weight as the run has them. Raises ValueError, also for a model that it does not suit."""
    import torch

    from train.optim.build import try_optimizer
    from train.optim.transfer import check_transfer

    on_host = config.engine.get("offload_optimizer", False)
    dtype = torch.float64 if config.precision.compute == "fp64" else torch.float32
    try_optimizer(config.optimizer, device="cpu" if on_host else device, dtype=dtype)
    check_transfer(config.optimizer, model)


def _stages(config: RunConfig, device: str, batches: list[list[int]] | None = None) -> None:
    """Raises ValueError for a pipeline that the model cannot be cut into, or that cannot run plans of `batches`."""
    import torch

    from train.stages import refuse

    if config.parallel.stages == 1 and config.parallel.pipeline_layers is None:
        return
    with torch.device("meta"):
        model = config.model.build()
    data, sequence = config.parallel.mesh(config.cluster.workers).split
    scheduler = config.scheduler.build()
    plans = [scheduler.plan(0, lengths, data=data, sequence=sequence) for lengths in batches or ()]
    refuse(config, model, device, plans)


def _warn_without_bf16(say: Callable[[str], None]) -> None:
    from train.precision import native_bf16

    if not native_bf16("cpu"):
        say("precision.compute=bf16: this CPU has no bf16 instructions, fp32 would be faster")


def _with_checkpoints(flight: CheckedRun, say: Callable[[str], None]) -> CheckedRun:
    """The run with the checkpoint that it continues from, or takes its weights from: found, verified and compared."""
    if flight.train.init_weights != "average" and not (flight.config.init_from or flight.config.resume):
        return flight
    from data.batches import changed
    from train.checkpoints import checkpoint, hf_reader

    if flight.train.init_weights == "average" and not (flight.config.init_from or flight.config.resume):
        raise ValueError("train.init_weights=average: must be raw without init_from")
    for key in ("resume", "init_from"):
        value = getattr(flight.config, key)
        if value is None or key == "init_from" and flight.resume is not None:
            continue
        path = Path(value)
        if is_checkpoint(path) or hf_reader.is_folder(path):
            try:
                checkpoint.verify(path)
            except checkpoint.DamagedError as error:
                raise ValueError(f"{key}={value}: this checkpoint is damaged ({error})") from None
            except ValueError as error:
                raise ValueError(f"{key}={value}: {error}") from None
        else:
            newest = _newest(flight, key, value, say)
            if newest is None:
                continue
            path = newest
        difference = checkpoint.first_difference(path, flight.shapes)
        if difference is not None:
            raise ValueError(f"{key}={value}: holds another model: {difference}")
        facts = checkpoint.manifest(path)
        if key == "init_from" and flight.train.init_weights == "average" and not facts.get("average"):
            raise ValueError(f"train.init_weights=average: must be raw, {path} holds no averaged weights")
        if key == "resume":
            if facts["data"] != flight.batches.fingerprint:
                why = changed(facts.get("order"), flight.batches.order)
                raise ValueError(f"resume={value}: was trained in another order: {why}")
            if facts["seed"] != flight.config.seed:
                raise ValueError(f"seed={flight.config.seed}: the run was started with seed={facts['seed']}")
            if flight.train.complete(facts["step"], facts["tokens"]):
                budget = "train.tokens" if flight.train.steps is None else "train.steps"
                raise ValueError(
                    f"resume={value}: is complete at step {facts['step']:,}; give a larger {budget} to go on"
                )
        if key == "init_from":
            init_from.sound(path, flight.config.model.values, say)
            init_from.same_tokens(path, flight.batches, say)
            init_from.still_held_out(path, flight.batches, say)
        flight = replace(flight, resume=path) if key == "resume" else replace(flight, init_from=path)
    return flight


def _newest(flight: CheckedRun, key: str, value: str, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run; None where it has none and is to begin again. Raises ValueError."""
    from train.checkpoints import checkpoint

    folder = run_folder(key, value, flight.cluster)
    folder = (folder if key == "resume" else latest(folder)) / "checkpoints"
    anew = key == "resume" and flight.config.run.anew
    newest = checkpoint.newest(folder, say)
    if newest is not None:
        if anew:
            raise ValueError(f"run.anew=true: must be false: {newest} is whole, and resume={value} goes on from it")
        return newest
    damaged = checkpoint.damaged(folder)
    if damaged and not anew:
        if key == "resume" and locked(folder.parent):  # whoever trains there takes old checkpoints away meanwhile
            raise ValueError(f"run.dir={folder.parent}: in use by another run")
        last, why = list(damaged.items())[-1]
        which = "its only checkpoint is damaged" if len(damaged) == 1 else f"all {len(damaged)} checkpoints are damaged"
        more = "; run.anew=true leaves them and begins at step 0" if key == "resume" else ""
        raise ValueError(f"{key}={value}: {which} ({last.name}: {why}){more}")
    if key != "resume":
        raise ValueError(f"{key}={value}: has no complete checkpoint")
    say(f"{value} has no complete checkpoint: starting from step 0")
    return None
