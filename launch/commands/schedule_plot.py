"""The schedule of a run, for `farspan plan`: its phases as lines, and as a picture with the size of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.figures import FAINT, INK, LOOK, NAMES
from launch.preflight.checked import CheckedRun

_POINTS = 2000


def lines(flight: CheckedRun) -> list[str]:
    """Each phase: where it begins, and the learning rate from there to its end."""
    schedule, rate, total = _schedule(flight)
    begin = schedule.begin or 0
    phases = [phase for phase in schedule.phases(total - begin) if phase.end > phase.begin]
    lines = [
        f"{phase.name} from {begin + phase.begin:,.0f}: {rate * phase.value(phase.begin):.3g} to "
        f"{rate * phase.value(phase.end):.3g}"
        for phase in phases
    ]
    ramp = flight.train.ramp
    if len(ramp.lines) > 1:
        sizes = [f"{size:,} from {reached:,}" for (_, size), (_, reached) in zip(ramp.lines, ramp.begins, strict=True)]
        lines.append(f"tokens of a step: {', '.join(sizes)}")
    return [f"{'' if i else 'schedule':<12}{line}" for i, line in enumerate(lines)]


def points(flight: CheckedRun) -> tuple[list[float], list[float], list[int]]:
    """(token, learning rate there, tokens of the step there) from where the run stands to its end, evenly spread."""
    from train.checkpoints import checkpoint

    schedule, rate, total = _schedule(flight)
    first = flight.train.reached(checkpoint.manifest(flight.resume)) if flight.resume else 0
    tokens = [first + (total - first) * i / _POINTS for i in range(_POINTS + 1)]
    ramp = flight.train.ramp
    steps = [ramp.steps(int(at) + 1) - 1 for at in tokens]
    return tokens, [rate * schedule.multiplier(at, total) for at in tokens], [ramp.size(step) for step in steps]


def draw(flight: CheckedRun, path: Path) -> None:
    """Writes the PNG, aside and renamed. Raises ValueError where it cannot be written."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tokens, rates, sizes = points(flight)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots()
        axes.plot(tokens, rates, color=NAMES[0], linewidth=1.8)
        axes.set(xlabel="tokens", ylabel="learning rate", xlim=(tokens[0], tokens[-1]), ylim=(0, 1.06 * max(rates)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        schedule, _, total = _schedule(flight)
        begin = schedule.begin or 0
        for phase in schedule.phases(total - begin):
            if phase.end > phase.begin and begin + phase.end > tokens[0]:
                axes.axvline(begin + phase.begin, color=FAINT, linewidth=0.7, linestyle=":")
        beside = axes.twinx()
        beside.step(tokens, sizes, where="post", color=NAMES[1], linewidth=1.2)
        beside.set(ylim=(0, 1.25 * max(sizes)))
        beside.set_ylabel("tokens of a step", color=NAMES[1])
        beside.yaxis.set_major_formatter(EngFormatter(sep=""))
        beside.grid(False)
        axes.set_title(f"{type(schedule).__name__}, {total:,} tokens", color=INK)
        aside = path.with_name(f"{path.name}.partial")
        try:
            figure.savefig(aside, dpi=160, format="png", facecolor="white")
        except OSError as error:
            raise ValueError(f"run.plot={path}: cannot be written ({error.strerror})") from None
    aside.replace(path)


def _schedule(flight: CheckedRun) -> tuple[Any, float, int]:
    """The schedule, the rate that it multiplies, and the run's tokens."""
    return flight.config.schedule.build(), flight.config.optimizer["lr"], flight.train.total_tokens
