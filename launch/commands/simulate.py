"""`farspan plan scheduler.simulate=N`: N steps of every scheduler on a cluster that is described, without any of it."""

from __future__ import annotations

from pathlib import Path

from launch.commands import gantt
from launch.config.validate import build
from launch.preflight.check import check_run
from parallel.schedule.adaptive.compare import SCHEDULERS, compare, text
from parallel.schedule.adaptive.cost import Cluster, Costs, NoRoomError
from parallel.schedule.adaptive.search import TooLongError
from parallel.schedule.adaptive.settings import SimulationSettings
from parallel.schedule.adaptive.simulate import timing
from train.run_config import RunConfig


def simulated(config: RunConfig, steps: int) -> list[str]:
    """The table, a line each; writes the picture of the first step where `run.plot` names one. Raises ValueError."""
    settings = config.simulation
    try:
        costs = settings.costs(lambda cluster: _configured(config, settings, cluster))
    except NoRoomError as error:
        raise ValueError(f"simulation.memory={settings.memory:g}: {error}") from None
    batches, lines = _batches(config, settings, steps)
    try:
        rows = compare(costs, batches, settings.schedulers, quantum=settings.quantum)
    except TooLongError as error:
        raise ValueError(f"simulation.longest={settings.longest}: {error}") from None
    except ValueError as error:
        raise ValueError(f"simulation.schedulers={settings.schedulers}: {error}") from None
    results = [
        f"simulated   {steps:,} steps of model {costs.model.name} on {costs.cluster.name}",
        f"sequences   {lines}",
        *(f"{'' if i else 'schedulers':<12}{line}" for i, line in enumerate(text(rows, costs))),
    ]
    if (picture := config.run.plot) and not rows[0].why:
        lengths = [-(-n // settings.quantum) * settings.quantum for n in batches[0]]
        packing = SCHEDULERS[rows[0].name](costs).pack(lengths)
        gantt.draw(costs, packing, lengths, f"{rows[0].name}, {costs.model.name}, first step", Path(picture))
        results.append(f"picture     {picture}: {timing(costs, packing, lengths).seconds:.4g} s of {rows[0].name}")
    return results


def _batches(config: RunConfig, settings: SimulationSettings, steps: int) -> tuple[list[list[int]], str]:
    """Each step's lengths, and what to say of them."""
    if settings.lengths is None:
        run = check_run(config, print)
        lengths = [[len(s.tokens) for s in run.batches.batch(config.seed, step)] for step in range(steps)]
        tokens = sum(map(sum, lengths))
        return lengths, f"{len(lengths[0]):,} in the first of the run's own steps, {tokens:,} tokens in all"
    lengths, left_out = settings.batches(steps)
    longest = max(map(max, lengths))
    dropped = f"; {left_out:,} longer than {settings.longest:,} are left out" if settings.longest else ""
    tokens = sum(map(sum, lengths)) // steps
    size = f"{tokens:,} tokens, at most {longest:,}"
    return lengths, f"{settings.sequences:,} a step of {settings.lengths}, {size}{dropped}"


def _configured(config: RunConfig, settings: SimulationSettings, cluster: Cluster) -> Costs:
    """The configured model's costs on a cluster, read off its shapes."""
    from train.precision import dtypes
    from train.step_costs import shaped

    device = config.cluster.device if config.cluster.device == "cpu" else "cuda"
    model = build(config)
    model.compute = dtypes(config.precision.compute, device)[0]
    launch = None if settings.launch is None else settings.launch / 1e3
    return shaped(
        config,
        model,
        cluster,
        device=device,
        rate=settings.rate * 1e12,
        launch=launch,
        quantum=settings.quantum,
        recompute=settings.recompute,
    )
