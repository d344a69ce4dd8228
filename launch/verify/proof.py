"""Runs the two sides of a proof, and finds the part of the layout that makes them differ."""

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from launch.errors import UserError
from launch.run.signals import stop_file
from launch.verify.shrink import PIPELINE, Shrunk, with_sizes
from launch.world import spawn
from parallel.schedule.mesh import Mesh
from train.run_config import RunConfig
from train.verify.trace import Place, RankTrace, Trace, Verdict, allowed, compare

ENTRY = "train.verify.world:run"
STEPS = 3
SEEDS = (1,)  # of the perturbations
LIMIT_S = 300.0  # for a world to finish its steps


class Reference(NamedTuple):
    """want: the trace of the plain model. limits: by how much rounding may move each of its tensors."""

    want: Trace
    limits: dict[Place, float]


class WorldError(Exception):
    """A layout that does not get to the end of its steps: why, in a line."""


def reference(config: RunConfig, steps: int = STEPS) -> Reference:
    """The side of one process, in this one."""
    import torch

    from train.verify import alone

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want, packed = alone.trace(config, steps), alone.trace(config, steps, packed=True)
        moved = [(alone.trace(config, steps, packed=True, perturbed=seed), packed) for seed in SEEDS]
    finally:
        torch.set_num_threads(before)
    return Reference(want, allowed(want, moved))


def world(config: RunConfig, steps: int = STEPS) -> list[RankTrace]:
    """The side of many processes: the trace of each rank. Raises WorldError where they do not finish, and UserError
    where they refuse the configuration."""
    import torch

    from train.verify.world import file_of

    until, workers = time.monotonic() + LIMIT_S, config.cluster.workers
    with tempfile.TemporaryDirectory(prefix="farspan-verify-") as place:
        folder = Path(place)

        def tick() -> None:
            if time.monotonic() > until:
                raise WorldError(f"its ranks were not done after {LIMIT_S:g} s: they wait for each other")
            if stop_file(folder).exists():  # an interrupt: nothing here is worth a graceful end
                raise KeyboardInterrupt

        order: dict[str, Any] = {"config": config, "run_dir": place, "device": "cpu", "steps": steps}
        outcome = spawn.spawn(
            ENTRY,
            order,
            workers=workers,
            run_dir=folder,
            device="cpu",
            threads=1,
            tick=tick,
            say=lambda line: None,
        )
        if outcome.ok:
            return [torch.load(file_of(folder, rank), weights_only=False) for rank in range(workers)]
        if outcome.exit_code == 2:
            raise UserError(str(outcome.reason))
        if not (folder / "error.txt").exists():
            raise KeyboardInterrupt
        last = [line for line in (folder / "error.txt").read_text().splitlines() if line.strip()][-1]
        raise WorldError(last.strip()[:300])


def judged(config: RunConfig, held: Reference, steps: int = STEPS) -> Verdict:
    """The verdict on a layout after so many steps. Raises WorldError where it does not run."""
    want = {place: x for place, x in held.want.items() if place.step < steps}
    try:
        return compare(want, held.limits, world(config, steps))
    except ValueError as error:
        raise WorldError(str(error)) from None


def both(shrunk: Shrunk) -> tuple[Reference, Verdict | str]:
    """The reference, made while the ranks run; and the verdict, or why there is none."""
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(reference, shrunk.config)
        try:
            traces: list[RankTrace] | str = world(shrunk.config)
        except WorldError as error:
            traces = str(error)
        held = made.result()
    if isinstance(traces, str):
        return held, traces
    try:
        return held, compare(held.want, held.limits, traces)
    except ValueError as error:
        return held, str(error)


@dataclass(frozen=True)
class Option:
    """A choice of the configuration beside the mesh. off: the run without it."""

    text: str
    off: Callable[[RunConfig], RunConfig]


def options(config: RunConfig) -> Iterator[Option]:
    """The choices that a fault may need, those that are made."""
    plain = {"recompute": "none", "tile": None, "offload_activations": False, "offload_optimizer": False}
    for key, value in plain.items():
        if config.engine.get(key, value) != value:
            yield Option(f"engine.{key}={_yaml(config.engine[key])}", _engine(key, value))
    if config.engine.get("reshard_after_forward", False):
        yield Option("engine.reshard_after_forward=true", _engine("reshard_after_forward", False))
    if config.scheduler.get("tokens_per_rank") is not None:
        yield Option(
            "several micro-steps (scheduler.tokens_per_rank)",
            lambda c: replace(c, scheduler=c.scheduler.having(tokens_per_rank=None)),
        )
    for name in ("recurrence", "attention"):
        if (chosen := getattr(config.parallel.transport, name)) != "gather":
            yield Option(f"parallel.transport.{name}={chosen}", _transport(name))
    if (order := getattr(config.parallel, "pipeline_schedule", "1f1b")) != "1f1b":
        plain_order: dict[str, Any] = {**PIPELINE}
        yield Option(
            f"parallel.pipeline_schedule={order}", lambda c: replace(c, parallel=replace(c.parallel, **plain_order))
        )
    for name in ("span_tokens", "loss_chunk"):
        if getattr(config.train, name) is not None:
            yield Option(f"train.{name}", _train(name))


def _engine(key: str, value: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda c: replace(c, engine=c.engine.having(**{key: value}))


def _transport(name: str) -> Callable[[RunConfig], RunConfig]:
    plain: dict[str, Any] = {name: "gather"}

    def off(config: RunConfig) -> RunConfig:
        transport = replace(config.parallel.transport, **plain)
        return replace(config, parallel=replace(config.parallel, transport=transport))

    return off


def _train(name: str) -> Callable[[RunConfig], RunConfig]:
    plain: dict[str, Any] = {name: None}
    return lambda c: replace(c, train=replace(c.train, **plain))


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Blame:
    """axes: those of the mesh that have the fault, () where one rank has it. options: choices without each of which it
    is gone. alone: whether each of the axes has it by itself, rather than all together."""

    axes: tuple[str, ...]
    options: tuple[str, ...]
    alone: bool


def blame(shrunk: Shrunk, held: Reference, steps: int, say: Callable[[str], None] = lambda line: None) -> Blame:
    """Runs the layout again with fewer axes, and then with fewer options, until the fault is gone."""

    def is_wrong(config: RunConfig, sizes: dict[str, int]) -> bool:
        say(f"looking for the axis: {Mesh(**sizes)}")
        try:
            return judged(with_sizes(config, sizes), held, steps).first is not None
        except WorldError:
            return True

    large = [axis for axis, size in shrunk.sizes.items() if size > 1]
    one, alone = dict.fromkeys(shrunk.sizes, 1), True
    axes, sizes = tuple[str, ...](), one
    if large and not is_wrong(shrunk.config, one):
        only = {axis: {**one, axis: shrunk.sizes[axis]} for axis in large}
        axes = tuple(axis for axis in large if len(large) == 1 or is_wrong(shrunk.config, only[axis]))
        alone = bool(axes)
        sizes = only[axes[0]] if axes else shrunk.sizes
        axes = axes or tuple(large)
    guilty = [option for option in options(shrunk.config) if not is_wrong(option.off(shrunk.config), sizes)]
    return Blame(axes, tuple(option.text for option in guilty), alone)
