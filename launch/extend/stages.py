"""All stages of a chain, checked before the first one starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.config.compose import checked
from launch.config.model import model_of
from launch.errors import UserError
from launch.evaluation.measure import trained_on
from launch.evaluation.report import columns
from launch.extend.compose import configured
from launch.preflight import init_from
from launch.preflight.check import check_run
from launch.preflight.checked import CheckedRun
from launch.preflight.corpus import open_batches
from launch.preflight.refusals import refusals
from launch.run import rundir
from models.positions import NoPE, Positions
from train.distill_settings import ConvertSettings
from train.run_config import ObjectConfig, RunConfig, Stage

NO_CONVERSION = ConvertSettings()
NUMBERED = ("train.tokens", "train.steps")  # of a chain, each stage has its own


@dataclass(frozen=True)
class Parent:
    """The model that a chain begins with. path: a checkpoint of ours, or a folder of Hugging Face's. trained: tokens of
    its longest sequences; None where it does not say. model: its section. converted: what that becomes before the first
    stage, and layers: those that are converted, settings: how; None and () without a conversion. scores: by layer, what
    the window costs the model in nats a token, where layers are chosen by it."""

    path: Path
    trained: int | None
    model: ObjectConfig
    converted: ObjectConfig | None = None
    layers: tuple[int, ...] = ()
    settings: ConvertSettings = NO_CONVERSION
    scores: Mapping[int, float] = field(default_factory=dict)

    @property
    def begins(self) -> ObjectConfig:
        """The model of the first stage."""
        return self.converted or self.model


@dataclass(frozen=True)
class StagePlan:
    """A stage that may start. name: of its folder. positions: what becomes of them, in lines. flight: as checked, with
    the parent in place of the stage before."""

    stage: Stage
    name: str
    config: RunConfig
    positions: list[str]
    flight: CheckedRun


def legs(config: RunConfig, overrides: list[str]) -> tuple[Parent, list[StagePlan]]:
    """The stages of a chain in their order, and what they extend. Raises UserError for what any of them is refused."""
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if key in NUMBERED:
            raise UserError(f"{override}: must not be given with stages, which have each their own")
    if config.cluster.kind == "ray":
        raise UserError("cluster=ray: must be none or local with stages: a chain runs on this machine")
    if config.evaluate.weights != "raw":
        raise UserError(f"evaluate.weights={config.evaluate.weights}: must be raw with stages")
    if stages := config.curriculum.get("context"):
        raise UserError(f"curriculum.context={stages}: must be null with stages, which say lengths and positions")
    parent = _after_conversion(config, _parent(config))
    legs_so_far: list[StagePlan] = []
    model, before = parent.begins, parent.trained
    for i, stage in enumerate(config.stages):
        try:
            leg = _leg(config, stage, i + 1, parent, model, before)
        except ValueError as error:
            raise UserError(f"stages[{i}].{' '.join(str(error).split())}") from None
        except UserError as error:
            raise UserError(f"stages[{i}]: {error}") from None
        legs_so_far.append(leg)
        model, before = leg.config.model, leg.stage.length
    return parent, legs_so_far


def _leg(
    config: RunConfig, stage: Stage, number: int, parent: Parent, model: ObjectConfig, before: int | None
) -> StagePlan:
    if before is not None and stage.length < before:
        what = f"those of init_from={config.init_from}" if number == 1 else "the stage before"
        raise ValueError(f"length={stage.length}: must be at least {before}, as {what}")
    leg = checked(configured(config, stage, number, model, str(parent.path), before))
    alone = replace(leg, init_from=str(parent.path))
    if number > 1:  # from the second stage on, the chain goes on from itself
        alone = replace(alone, train=replace(alone.train, init_optimizer=config.train.init_optimizer))
    if parent.converted is not None:  # whose weights are not there yet
        alone = replace(alone, init_from=None, train=replace(alone.train, init_optimizer="reset"))
    texts = _positions(stage, parent, model, leg.model, before)
    flight = check_run(alone, lambda line: None)  # the run itself says it again
    if parent.converted is not None:
        init_from.still_held_out(parent.path, flight.batches, lambda line: None)
    return StagePlan(stage, rundir.stage_name(number, stage.length), leg, texts, flight)


def _parent(config: RunConfig) -> Parent:
    """Raises UserError."""
    from train.checkpoints import checkpoint, hf_reader
    from train.checkpoints.hf_convert import rebased

    value = config.init_from
    if value is None:
        raise UserError("init_from: missing; stages extend a run, a checkpoint or a folder of Hugging Face's")
    path = Path(value)
    if hf_reader.is_folder(path):
        with refusals(config):
            return Parent(path, trained_on(path), config.model)
    if rundir.is_checkpoint(path):
        try:
            checkpoint.verify(path)
        except checkpoint.DamagedError as error:
            raise UserError(f"init_from={value}: this checkpoint is damaged ({error})") from None
    else:
        newest = checkpoint.newest(
            rundir.latest(rundir.run_folder("init_from", value)) / "checkpoints", lambda line: None
        )
        if newest is None:
            raise UserError(f"init_from={value}: has no complete checkpoint")
        path = newest
    base = checkpoint.manifest(path).get("rope_theta")  # what the parent's curriculum has made of it
    model = ObjectConfig(rebased(dict(config.model.values), base)) if base else config.model
    return Parent(path, trained_on(path), model)


def _after_conversion(config: RunConfig, parent: Parent) -> Parent:
    """The parent with what a conversion makes of its model. Raises UserError."""
    settings = config.convert
    if settings.override is None:
        return parent
    from train.conversion import converted

    train = config.train
    for key, must in (("init_optimizer", "reset"), ("init_weights", "raw")):
        if (value := getattr(train, key)) != must:
            raise UserError(f"train.{key}={value}: must be {must} with {settings.override}")
    try:
        settings, scores = _chosen(config, parent)
        model, layers = converted(dict(parent.model.values), settings)
        model_of(model)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    converted_model = ObjectConfig(model)
    return replace(parent, converted=converted_model, layers=tuple(layers), settings=settings, scores=scores)


def _chosen(config: RunConfig, parent: Parent) -> tuple[ConvertSettings, dict[int, float]]:
    """The conversion with the layers that stay, and their scores where those say which. Raises ValueError."""
    settings, scores = config.convert, dict[int, float]()
    if settings.by == "place" or settings.keep is not None:
        return settings, scores
    from train.conversion import built, candidates, staying
    from train.layer_scores import score

    model = dict(parent.model.values)
    able = candidates(built(model), settings)
    first = checked(configured(config, config.stages[0], 1, parent.model, str(parent.path)))
    batches = open_batches(first, model["vocabulary"], lambda line: None)
    scores = score(parent.path, model, able, settings.window, batches, config.seed)
    return replace(settings, keep=staying(settings, able, list(scores.values()))), scores


def _positions(
    stage: Stage, parent: Parent, before: ObjectConfig, after: ObjectConfig, trained: int | None
) -> list[str]:
    """Returns what becomes of rotary positions, a line each kind. Raises ValueError for a rule that does not reach."""
    lines = []
    for plain, was, now in zip(*(_layers(model) for model in (parent.begins, before, after)), strict=True):
        if isinstance(now.positions, NoPE):
            lines += [] if isinstance(was.positions, NoPE) else [f"{type(was.positions).__name__} becomes NoPE"]
            continue
        original = (parent.trained or math.inf) / getattr(plain.positions, "factor", 1.0)
        reaches, farthest = now.positions.reaches(original), min(stage.length, now.window or math.inf)
        if reaches < farthest:  # behind a window nothing is farther away
            rule = "null" if stage.positions is None else now.positions
            raise ValueError(
                f"positions={rule}: must reach length={stage.length}; "
                f"{type(now.positions).__name__} reaches {math.floor(reaches)}"
            )
        seen = None if trained is None else min(trained, was.window or trained)
        lines.append(_turns(was, now, seen, int(farthest)))
    return list(dict.fromkeys(lines)) or ["no layer has rotary positions"]


def _layers(model: ObjectConfig) -> list[Any]:
    """The modules of a model that have positions, or could have."""
    modules = model_of(model.values).modules()
    return [module for module in modules if isinstance(getattr(module, "positions", None), Positions)]


def _turns(was: Any, now: Any, trained: int | None, length: int) -> str:
    """Returns what the slowest pair of channels turns by over all of a document, before and after."""
    old, new = (float(m.positions.frequencies(m.head_dim)[0].min()) for m in (was, now))
    text = f"the slowest pair turns by {new * length:.3g} rad over {length:,} tokens"
    if trained is not None:
        times = new * length / (old * trained) if old else 0.0
        far = f"{times:.3g} times as far" if times > 1 + 1e-9 else "no farther"
        text += f", by {old * trained:.3g} over the {trained:,} before: {far}"
    a, b = was.positions, now.positions
    if type(a) is not type(b):
        text += f"; {type(a).__name__} becomes {type(b).__name__}"
    if a.base != b.base:
        faster = ", so that pairs turn faster than was trained" if b.base < a.base else ""
        return f"{text}; base {a.base:,.0f} becomes {b.base:,.0f}{faster}"
    return f"{text}; base {b.base:,.0f} as before"


def table(parent: Parent, stages: list[StagePlan]) -> list[str]:
    """The stages, for a person: a line each, and what becomes of positions."""

    rows = [
        [
            leg.name,
            f"{leg.stage.length:,}",
            f"{leg.flight.train.total_tokens:,}",
            f"{leg.config.train.batch_tokens:,}",
            f"{leg.config.optimizer['lr']:g}",
            *_flops(leg),
            _weights(leg.config),
        ]
        for leg in stages
    ]
    head = ["length", "tokens", "a step", "lr", "FLOPs a token", "attention", "weights"]
    known = "of unknown length" if parent.trained is None else f"trained on {parent.trained:,} tokens"
    return [
        f"extends     {parent.path}, {known}",
        *_conversion(parent),
        *columns(head, rows, "stage"),
        *(f"{leg.name}: {line}" for leg in stages for line in leg.positions),
    ]


def _conversion(parent: Parent) -> list[str]:
    if parent.converted is None:
        return []
    from train.conversion import lost

    before, after = dict(parent.model.values), dict(parent.converted.values)
    layer, window = model_of(after).layers[str(parent.layers[0])], parent.settings.window
    numbers = ", ".join(map(str, parent.layers))
    made = f"becomes {type(layer.mixer).__name__}"
    if window is not None:
        made = f"sees {window:,} tokens{'' if layer.beside is None else f' beside {type(layer.beside).__name__}'}"
    lines = [f"converts    layers {numbers} of {after['layers']}: softmax attention {made}"]
    if parent.scores:
        cost = ", ".join(f"{i}: {nats:+.4f}" for i, nats in parent.scores.items())
        lines.append(f"            nats a token that the window costs, by layer: {cost}")
    if names := lost(before, list(parent.layers), after, parent.settings):
        more = "" if len(names) == 1 else f" and {len(names) - 1} more"
        lines.append(f"            nothing begins from {names[0]}{more}")
    return lines


def _flops(leg: StagePlan) -> list[str]:
    """FLOPs of training on a document that fills the length, and the share of softmax attention's products."""
    from models.accounting import account

    try:
        costs = account(model_of(leg.config.model.values), device=leg.flight.device)
    except NotImplementedError:
        return ["", ""]
    flops = costs.flops([leg.stage.length])
    a_token = flops.model / leg.stage.length
    return [f"{a_token:.3g}", f"{1 - sum(costs.per_token[:2]) / a_token:.0%}"]


def _weights(config: RunConfig) -> str:
    sources = config.data.get("sources") or {}
    return ", ".join(f"{name} {portion['weight']}" for name, portion in sources.items())
