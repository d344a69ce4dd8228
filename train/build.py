"""The assembly of a worker: from the resolved configuration to a Trainer, in the order things depend on each other."""

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from data.batch_ramp import opened
from data.prefetch import Prefetched
from models.lm import LM
from parallel.activation_memory import give_back
from parallel.mesh import Groups, Meshes
from parallel.schedule.adaptive.scheduler import Adaptive
from parallel.schedule.plan import Plan
from parallel.tensor import division_of
from train.checkpoints import checkpoint
from train.checkpoints.hook import Checkpoints
from train.engines.engine import EngineOptimizer
from train.evaluation.heldout import Evaluation, apart, divided
from train.evaluation.texts import bytes_per_target
from train.execute import Executor
from train.guards.hang_timeout import Patience
from train.guards.rollback import ALERT, Rollback
from train.guards.step_guard import Guard
from train.hooks import Hooks
from train.loop import Trainer
from train.metrics.comm_record import TransportChoice
from train.metrics.layer_clock import LayerClock
from train.metrics.plan_notes import NOTED, PlanNotes
from train.metrics.timing import PhaseTimes
from train.optim import carry_over
from train.optim.average import Average
from train.placed_model import place_model
from train.planning import Planning
from train.run_config import RunConfig
from train.settings import TrainSettings
from train.state import State, TrainProgress
from train.time_spans import Spans, SpansTold
from train.tracking import Facts, RunLog, Tracker, newest_attempt
from train.tracking.hook import Recording


def build(order: dict[str, Any]) -> Trainer:
    """A Trainer from what the launcher ordered.

    order: `config` (a RunConfig), `run_dir`, `device`, and optionally `resume` (a verified checkpoint to continue, with
    the optimizer's state and the step), `init_from` (one to take weights from), `attempt` (which start of the run this
    is, by the launcher's count, from 1) and `code` (what `Facts` says of it).
    """
    config: RunConfig = order["config"]
    train, run_dir = config.train, Path(order["run_dir"])
    device = torch.device("cuda", torch.cuda.current_device()) if order["device"] == "cuda" else torch.device("cpu")
    first = dist.get_rank() == 0
    say = RunLog(run_dir / "log.txt") if first else lambda line: None
    phases = PhaseTimes()
    mesh = config.parallel.mesh(dist.get_world_size())
    waiting = partial(phases, "wait")
    meshes, groups = Meshes(mesh, device, waiting=waiting), Groups(mesh, waiting=waiting)

    placed = place_model(order, meshes, phases, say)
    model, adamw = placed.model, placed.optimizer
    state, facts = _start(order, model, adamw, train.init_optimizer)

    model.loss_chunk = train.loss_chunk
    data, sequence = mesh.split
    recurrence, attention = config.parallel.transport.build()
    batches = Prefetched(_batches(config, train))
    scheduler, spans = config.scheduler.build(), _spans(config, train)
    adaptive = isinstance(scheduler, Adaptive)
    each = 1 if spans is not None else _most_spans(scheduler, batches.shapes(), data, sequence)
    if spans is not None and device.type == "cpu" and config.engine.get("recompute", "none") == "none":
        give_back(model.layers)  # as what is computed again does by itself
    own = adamw if isinstance(adamw, EngineOptimizer) else None
    executor = Executor(
        model if own is None else own.model,
        groups,
        device,
        recurrence,
        attention,
        train.balance_weight,
        phases,
        train.z_weight,
        spans,
        SpansTold(say),
        placed.pipeline,
        placed.experts,
        placed.limited,
        own,
        placed.low if config.precision.scales == "sequence" else None,
        placed.teacher,
        placed.model.mtp_layers,
        train.mtp_weight,
        train.index_weight,
    )
    progress = TrainProgress(train, state)

    def plan(lengths: list[int]) -> Plan:
        return scheduler.plan(progress.state.step + 1, lengths, data=data, sequence=sequence)

    planning = (
        Planning.of(config, groups, batches.following, progress, run_dir, order["device"], say) if adaptive else None
    )
    clock = LayerClock(model.layers.values(), phases) if adaptive and device.type == "cpu" else None
    patience = Patience(config.cluster.timeout)
    parts = _Parts(config, run_dir, model, adamw, batches, executor, plan, progress, phases, say, patience, planning)
    widest = groups.world if adaptive else sequence
    transport = TransportChoice(recurrence, placed.asks, groups, widest, 2 if adaptive else each, device, say)
    hooks = _hooks(parts, transport, facts, replays=bool(order.get("init_from") and batches.sides))
    # A transport is measured here: before a tracker has threads.
    hooks.load(facts, Path(order["resume"]) if order.get("resume") else None, division_of(model))
    if first:
        hooks.of(Recording).tracker = _tracker(order, say, placed.counts)
    return Trainer(
        progress=progress,
        seed=config.seed,
        rate=config.optimizer["lr"],
        stop=run_dir / "stop",
        model=model,
        optimizer=adamw,
        schedule=config.schedule.build(),
        batches=batches,
        plan=plan,
        executor=executor,
        groups=groups,
        phases=phases,
        patience=patience,
        guard=hooks.of(Guard),
        rollback=_rollback(parts, hooks, split=(data, sequence)),
        hooks=hooks,
        utilisation=placed.utilisation,
        norms=bool(config.tracking.get("norms")),
        planned=planning.next if planning else None,
        computing=clock.take if clock else None,
        observe=planning.observe if planning else None,
    )


class _Parts(NamedTuple):
    """Holds what the loop, its hooks and its rollback share."""

    config: RunConfig
    run_dir: Path
    model: LM
    optimizer: Optimizer
    batches: Any
    executor: Executor
    plan: Callable[[list[int]], Plan]
    progress: TrainProgress
    phases: PhaseTimes
    say: Callable[[str], None]
    patience: Patience
    planning: Planning | None


def _hooks(parts: _Parts, transport: TransportChoice, facts: dict[str, Any], *, replays: bool) -> Hooks:
    """Lists the hooks of the run, the same on every rank, in the order in which they are called: those that add to a
    record stand before the one that writes it.

    facts: the manifest of the checkpoint that the run goes on from. replays: the weights may forget an old source.
    """
    config, progress, groups = parts.config, parts.progress, parts.executor.groups
    first = groups.first
    recording = Recording(parts.run_dir, progress, parts.phases)
    average = _average(config.train, parts.model, progress, parts.say)
    hooks = Hooks()
    hooks.add(Guard(config.train.guard, groups.stages_comm, parts.executor.device))
    hooks.add(transport)
    if average is not None:
        hooks.add(average)
    if parts.planning is not None:
        hooks.add(parts.planning)
    hooks.add(PlanNotes(parts.run_dir / "plans" if first else None, NOTED if parts.planning else None))
    plan, at_once = _evaluation_plan(parts)
    evaluation = Evaluation(
        executor=parts.executor,
        batches=parts.batches,
        plan=plan,
        at_once=at_once,
        progress=progress,
        phases=parts.phases,
        seed=config.seed,
        log=recording.log,
        average=average,
        bytes_per_target=_bytes_per_target(parts.batches, config.train.evaluate_tokens) if first else (None, None),
        replays=replays,
    )
    hooks.add(evaluation)
    checkpoints = Checkpoints(
        folder=parts.run_dir / "checkpoints",
        model=parts.model,
        optimizer=parts.optimizer,
        batches=parts.batches,
        progress=progress,
        hooks=hooks,
        phases=parts.phases,
        patience=parts.patience,
        say=parts.say,
        written=recording.checkpoint,
        facts=_of_the_run(config, parts.batches, facts),
        companions=_companions(parts.run_dir, parts.batches) if first else (),
        pipeline=parts.executor.pipeline,
    )
    hooks.add(checkpoints)
    hooks.add(recording)
    return hooks


def _evaluation_plan(parts: _Parts) -> tuple[Callable[[list[int]], Plan], int]:
    """Returns the plan of evaluations, and how many windows it wants at once: that of training where a rank holds no
    more than that lets it, or where the experts' choices depend on what else a rank holds."""
    executor = parts.executor
    if executor.spans is not None or executor.pipeline is not None or executor.limited:
        return parts.plan, 1
    data, sequence = executor.groups.mesh.split
    return apart(parts.plan, data=data, sequence=sequence)


def _bytes_per_target(batches: Any, tokens: int | None) -> tuple[float | None, float | None]:
    """Returns the bytes of text of a held-out target: of all, and of the part of so many tokens."""
    parts = divided(batches.heldout_by_source(), tokens)
    whole = bytes_per_target(batches)
    if not any(part.rest for part in parts.values()):
        return whole, whole
    return whole, bytes_per_target(batches, [window for part in parts.values() for window in part.read])


def _rollback(parts: _Parts, hooks: Hooks, *, split: tuple[int, int]) -> Rollback:
    """Builds what passes over batches and goes back; split: data groups, and ranks of a sequence."""

    def tell(line: str) -> None:
        parts.say(line)
        hooks.of(Recording).alert(ALERT, line, "WARN")

    return Rollback(
        run_dir=parts.run_dir,
        progress=parts.progress,
        seed=parts.config.seed,
        model=parts.model,
        optimizer=parts.optimizer,
        batches=parts.batches,
        executor=parts.executor,
        groups=parts.executor.groups,
        split=split,
        load=hooks.of(Checkpoints).go_back,
        tell=tell,
        settle=hooks.of(Checkpoints).settle,
    )


def _start(order: dict[str, Any], model: LM, adamw: Optimizer, keep: str) -> tuple[State, dict[str, Any]]:
    """Returns where the run stands, its weights filled; and what the checkpoint that it goes on from says, {} without
    one.

    keep: what becomes of the optimizer's state with `init_from`.
    """
    state, facts = State(attempt=0), dict[str, Any]()
    if order.get("resume"):
        facts = checkpoint.load(Path(order["resume"]), model, adamw)
        state = State.of(facts)
    elif order.get("init_from"):
        manifest = checkpoint.load_weights(Path(order["init_from"]), model, adamw)
        facts = {} if manifest.get("published") is None else {"published": manifest["published"]}
        if order["config"].train.init_weights == "average":
            checkpoint.load_average(Path(order["init_from"]), model, adamw)
        if keep != "reset":
            carry_over.load(Path(order["init_from"]), model, adamw, keep)
    state.attempt = _attempt(order, state.attempt)
    return state, facts


def _average(train: TrainSettings, model: LM, progress: TrainProgress, say: Callable[[str], None]) -> Average | None:
    """The average that the settings ask for, of the weights as they are."""
    if train.average == "none":
        return None
    tokens = train.average_tokens or max(1, train.total_tokens // 20)
    return Average(model, progress, train.average, tokens, train.average_count, say)


def _of_the_run(config: RunConfig, batches: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns what every checkpoint's manifest says of the run. published: the folder in Hugging Face's format that its
    weights
    first came from, as the checkpoint that it goes on from has it."""
    identity = {"seed": config.seed, "data": batches.fingerprint, "order": batches.order}
    return identity | ({} if facts.get("published") is None else {"published": facts["published"]})


def _most_spans(scheduler: Any, shapes: Sequence[Sequence[int]], data: int, sequence: int) -> int:
    """That a rank has of a packed sequence in any plan."""
    plans = [scheduler.plan(0, lengths, data=data, sequence=sequence) for lengths in shapes]
    return max(len(held) for plan in plans for micro in plan.micro_steps for g in micro.groups for held in g.spans)


def _batches(config: RunConfig, train: TrainSettings) -> Any:
    """The batches of the run's corpus. Raises ValueError where machines have another one under the same name."""
    batches = opened(config.data.build(), train.batch_tokens, config.curriculum.build())
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (batches.fingerprint, socket.gethostname()))
    if others := [host for fingerprint, host in shares if fingerprint != shares[0][0]]:
        raise ValueError(f"data: {others[0]} has other documents than {shares[0][1]}; share them through data.store")
    return batches


def _spans(config: RunConfig, train: TrainSettings) -> Spans | None:
    """Returns what lies between spans in time waits where activations do."""
    if train.span_tokens is None:
        return None
    return Spans(train.span_tokens, train.span_gradient, bool(config.engine.get("offload_activations")))


def _companions(run_dir: Path, batches: Any) -> list[Path]:
    """The files that travel with the run and with every checkpoint, two of them written here."""
    for name, card in (("tokenizer.json", batches.tokenizer.card()), ("corpus.json", batches.card())):
        aside = run_dir / f"{name}.partial"
        try:
            aside.write_text(json.dumps(card, indent=2) + "\n")
            aside.replace(run_dir / name)
        except OSError:  # no room: what is there stays as it was
            aside.unlink(missing_ok=True)
            raise
    names = ("config.yaml", "tokenizer.json", "corpus.json")
    return [run_dir / name for name in names if (run_dir / name).exists()]


def _attempt(order: dict[str, Any], saved: int) -> int:
    """Returns which start of the run this is, the same on every rank: a number that no record and no checkpoint has
    yet.

    `saved` is the checkpoint's, 0 without one. An attempt may have died before its first checkpoint, so rank 0 also
    looks into metrics.jsonl, which it alone writes; a launcher's count holds unless the folder knows a later attempt.
    """
    recorded = [newest_attempt(Path(order["run_dir"]) / "metrics.jsonl") if dist.get_rank() == 0 else 0]
    dist.broadcast_object_list(recorded)
    return max(order.get("attempt") or 1, saved + 1, recorded[0] + 1)


def _tracker(order: dict[str, Any], say: Callable[[str], None], counts: dict[str, int]) -> Tracker:
    return order["config"].tracking.build().open(replace(Facts.of(order), parameters=counts), say)


def run(order: dict[str, Any]) -> None:
    """The entry that a launcher calls on every rank, torch.distributed being initialised."""
    trainer = build(order)
    trainer.fit()
