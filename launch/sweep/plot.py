"""A sweep as a picture: training loss over tokens, and held-out loss over the swept values.

Colour is the first swept key's value and line style the second's, in both panels. A number's colours are ordered from
dark to light, names take Okabe and Ito's palette: both can be told apart without seeing red and green.
"""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from launch.figures import ALARM, FAINT, INK, LOOK, NAMES
from launch.sweep.members import Swept, plain
from launch.sweep.table import Result, best, ranked

STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.3)), (0, (5, 1.5, 1, 1.5)))
_SMOOTH = 40  # the running mean is over this part of a curve's points
_START = 20  # the first part of the curves, this small, may leave the panel: it is the same for all, and steep
_FAR = 1.5  # a held-out loss this many times the best is drawn at the top, with its value, where few are
_LEGEND = 9  # values that a legend inside the panel holds
_POINTS = 50_000  # up to which matplotlib looks for the emptiest corner, which takes it a second there
_ROWS = 40  # members of a dot plot
_DECADE = 10.0
_LETTER = 0.02  # of a panel's width


def draw(path: Path, title: str, swept: list[Swept], results: list[Result]) -> None:
    """Writes the PNG of a sweep, aside and renamed."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    number = next((key for key in swept if key.numbers and len(set(key.numbers)) > 1), None)
    height = 4.4 if number else max(4.4, 0.24 * min(len(results), _ROWS) + 1.6)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(11, height), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        colours, styles = _colours(swept[0]), _styles(swept)
        _curves(left, swept, results, colours, styles)
        _legend(figure, left, swept, colours, styles)
        if number is None:
            _dots(right, swept, results, colours)
        else:
            _lines(right, number, swept, results, colours, styles)
        right.set_title("Held-out loss")
        figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold")
        if words := _unfinished(swept, results):
            failed = any(result.member.state == "failed" for result in results)
            figure.supxlabel(words, x=0.008, ha="left", fontsize=8, color=ALARM if failed else INK)
        aside = path.with_name(f"{path.name}.partial")
        figure.savefig(aside, dpi=160, format="png", facecolor="white")
    aside.replace(path)


def _curves(axes: Any, swept: list[Swept], results: list[Result], colours: dict, styles: dict) -> None:
    """Training loss over tokens. A member that diverges leaves the panel at its top; the others stay legible."""
    from matplotlib.ticker import EngFormatter

    axes.set_title("Training loss")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    tops, ends = [], []
    for result in sorted(results, key=lambda result: result.done):
        if not result.curve:
            continue
        tokens = np.array([point[0] for point in result.curve], dtype=float)
        loss = smooth(np.array([point[1] for point in result.curve], dtype=float))
        colour = colours[result.member.values[swept[0].key]]
        axes.plot(
            tokens,
            loss,
            color=colour,
            linestyle=_style(result, swept, styles),
            linewidth=1.5 if len(results) <= 12 else 1.0,
            alpha=1 if result.done else 0.55,
        )
        if result.member.state == "failed":
            axes.plot(tokens[-1], loss[-1], marker="x", color=ALARM, markersize=6, markeredgewidth=1.6)
        elif not result.done:
            axes.plot(tokens[-1], loss[-1], marker="o", color=colour, markerfacecolor="white", markersize=5)
        tops.append((not result.done, loss[len(loss) // _START]))
        ends.append(loss.min())
    if not tops:
        _empty(axes, "no member has trained a step yet")
        return
    first = min(unfinished for unfinished, _ in tops)
    top = max(start for unfinished, start in tops if unfinished == first)
    room = 0.04 * (top - min(ends)) or 0.1
    axes.set_ylim(min(ends) - room, top + room)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def smooth(values: np.ndarray) -> np.ndarray:
    """The running mean over a fortieth of the points, centred, over fewer near the ends."""
    half = len(values) // (2 * _SMOOTH)
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    reach = np.minimum(half, np.minimum(middle, len(values) - 1 - middle))
    return (total[middle + reach + 1] - total[middle - reach]) / (2 * reach + 1)


def _lines(axes: Any, number: Swept, swept: list[Swept], results: list[Result], colours: dict, styles: dict) -> None:
    """Held-out loss over a swept number, one line for each combination of the other keys."""
    others = [key for key in swept if key is not number]
    place = dict(zip(number.values, number.numbers or [], strict=True))
    lines: dict[tuple[str, ...], list[tuple[float, float, Result]]] = {}
    top = _top([result.heldout for result in results if result.heldout is not None])
    for result in results:
        if result.heldout is not None:
            point = place[result.member.values[number.key]], min(result.heldout, top), result
            lines.setdefault(tuple(result.member.values[key.key] for key in others), []).append(point)
    axes.set_xlabel(number.path)
    axes.set_ylabel("loss, nats per token")
    if not lines:
        _empty(axes, "no member has a held-out loss yet")
        return
    values = sorted(set(place.values()))
    if values[0] > 0 and values[-1] / values[0] >= _DECADE:
        axes.set_xscale("log")
    ends = []
    for points in lines.values():
        points.sort(key=lambda point: point[0])
        xs, ys, line = zip(*points, strict=True)
        colour = colours[line[0].member.values[swept[0].key]] if swept[0] in others else FAINT
        axes.plot(xs, ys, color=colour, linestyle=_style(line[0], swept, styles, others), linewidth=1.2, zorder=2)
        for x, y, result in points:
            _point(axes, x, y, result, colours[result.member.values[swept[0].key]])
        ends.append((xs[-1], ys[-1], _words(line[0], others), INK if colour == FAINT else colour))
    _mark_best(axes, results, place, number)
    if others and len(ends) <= _LEGEND:
        _label(axes, ends)
    if len(values) <= 8:
        texts = {x: plain(value) for value, x in place.items()}
        shown = _apart(values, [texts[x] for x in values], log=axes.get_xscale() == "log")
        axes.set_xticks(values, [texts[x] if x in shown else "" for x in values])
        axes.minorticks_off()


def _apart(values: list[float], texts: list[str], *, log: bool) -> set[float]:
    """Picks, from ascending values on an axis, those whose texts have room beside the one before."""
    places = np.log(values) if log else np.array(values)
    width = float(places[-1] - places[0]) or 1.0
    shown, end = set(), -math.inf
    for value, place, text in zip(values, places, texts, strict=True):
        half = _LETTER * (len(text) + 1) / 2
        at = float(place - places[0]) / width
        if at - half >= end:
            shown.add(value)
            end = at + half
    return shown


def _top(losses: list[float]) -> float:
    """Returns where losses are drawn that are far above the others; above all of them where none, or too many, are."""
    near = [loss for loss in losses if loss <= _FAR * min(losses)]
    if not losses or len(near) == len(losses) or len(losses) - len(near) > len(losses) / 4:
        return max(losses, default=0.0)
    return max(near) + 0.15 * (max(near) - min(near) or _FAR)


def _point(axes: Any, x: float, y: float, result: Result, colour: Any) -> None:
    """A member's result: hollow where it has not finished, a triangle at the top where it lies far above."""
    above = result.heldout is not None and result.heldout > y
    marker, filling = "^" if above else "o", colour if result.done else "white"
    axes.plot(x, y, marker=marker, markersize=6, color=colour, markerfacecolor=filling, zorder=3)
    if above:
        text = f"{result.heldout:.2f}"
        axes.annotate(text, (x, y), (-7, 0), textcoords="offset points", ha="right", va="center", fontsize=8)


def _mark_best(axes: Any, results: list[Result], place: dict[str, float], number: Swept) -> None:
    first = best(results)
    if first is None:
        return
    x = place[first.member.values[number.key]]
    axes.plot(x, first.heldout, marker="o", markersize=12, color="none", markeredgecolor=INK, zorder=4)
    axes.annotate(
        f"{first.heldout:.3f}",
        (x, first.heldout),
        (0, -10),
        textcoords="offset points",
        ha="center",
        va="top",
        fontweight="bold",
    )
    axes.margins(y=0.14)


def _label(axes: Any, ends: list[tuple[float, float, str, Any]]) -> None:
    """Names the lines behind their last points, far enough from each other to be read."""
    low, high = axes.get_ylim()
    gap = 0.05 * (high - low)
    at = -float("inf")
    for x, y, words, colour in sorted(ends, key=lambda end: end[1]):
        at = max(y, at + gap)
        axes.annotate(words, (x, at), (9, 0), textcoords="offset points", va="center", color=colour, fontsize=8.5)


def _dots(axes: Any, swept: list[Swept], results: list[Result], colours: dict) -> None:
    """Held-out loss of each member, the best at the top."""
    shown = [result for result in ranked(results) if result.heldout is not None]
    left_out = len(shown) - _ROWS
    shown = shown[:_ROWS]
    axes.set_xlabel("loss, nats per token")
    if not shown:
        _empty(axes, "no member has a held-out loss yet")
        return
    first = best(results)
    for row, result in zip(count(), shown):
        colour = colours[result.member.values[swept[0].key]]
        axes.plot(
            result.heldout, row, "o", markersize=6.5, color=colour, markerfacecolor=colour if result.done else "white"
        )
        axes.annotate(
            f"{result.heldout:.3f}",
            (result.heldout, row),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if result is first else "normal",
        )
    axes.set_yticks(range(len(shown)), [_words(result, swept) for result in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.grid(False, axis="x")
    if left_out > 0:
        axes.set_xlabel(f"loss, nats per token ({left_out} more in table.txt)")


def _colours(key: Swept) -> dict[str, Any]:
    """A colour for each value: ordered for numbers, distinct for names."""
    from matplotlib import colormaps

    values = list(dict.fromkeys(key.values))
    if key.numbers is None and len(values) <= len(NAMES):
        return dict(zip(values, NAMES, strict=False))
    if key.numbers is not None:
        values = sorted(values, key=float)
    return dict(zip(values, colormaps["viridis"](np.linspace(0.05, 0.85, len(values))), strict=True))


def _styles(swept: list[Swept]) -> dict[str, Any]:
    """A line style for each value of the second key; none where there are more than can be told apart."""
    values = list(dict.fromkeys(swept[1].values)) if len(swept) > 1 else []
    return dict(zip(values, STYLES, strict=False)) if len(values) <= len(STYLES) else {}


def _style(result: Result, swept: list[Swept], styles: dict[str, Any], among: list[Swept] | None = None) -> Any:
    """A member's line style; solid where the second key is not `among` those that set a line apart."""
    if not styles or among is not None and swept[1] not in among:
        return "-"
    return styles[result.member.values[swept[1].key]]


def _legend(figure: Any, axes: Any, swept: list[Swept], colours: dict, styles: dict) -> None:
    """Inside the panel, a column a key; below it where one has many values, as a scale where they are numbers."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm, Normalize
    from matplotlib.lines import Line2D

    columns = []
    if not axes.lines:
        return
    if swept[0].numbers and len(colours) > _LEGEND:
        numbers = sorted(map(float, colours))
        log = numbers[0] > 0 and numbers[-1] / numbers[0] >= _DECADE
        norm = (LogNorm if log else Normalize)(numbers[0], numbers[-1])
        scale = ScalarMappable(norm, ListedColormap([colours[value] for value in sorted(colours, key=float)]))
        bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=40)
        bar.outline.set_visible(False)
        bar.set_label(swept[0].label)
    else:
        columns.append((swept[0].label, [(plain(v), {"color": c}) for v, c in colours.items()]))
    if styles:
        columns.append((swept[1].label, [(plain(v), {"color": INK, "linestyle": s}) for v, s in styles.items()]))
    if not columns:
        return
    rows = max(len(entries) for _, entries in columns)
    blank = Line2D([], [], color="none")
    if rows > _LEGEND:
        drawn = [(Line2D([], [], **look), words) for _, entries in columns for words, look in entries]
        figure.legend(*zip(*drawn, strict=True), loc="outside lower center", ncols=6, frameon=False)
        return
    handles, labels = [], []
    for heading, entries in columns:
        filling = [("", None)] * (rows - len(entries))
        for words, look in [(heading, None), *entries, *filling]:
            handles.append(Line2D([], [], linewidth=2, **look) if look else blank)
            labels.append(words)
    few = sum(len(line.get_xdata()) for line in axes.lines) < _POINTS
    place = "best" if few else "upper right"
    legend = axes.legend(handles, labels, ncols=len(columns), loc=place, edgecolor="none", framealpha=0.85)
    for position in range(0, len(labels), rows + 1):
        legend.get_texts()[position].set_fontweight("bold")


def _words(result: Result, keys: list[Swept]) -> str:
    """A member's values of some keys: names speak for themselves, numbers are named."""
    pairs = [(key, plain(result.member.values[key.key])) for key in keys]
    return ", ".join(f"{key.label} {value}" if key.numbers else value for key, value in pairs)


def _unfinished(swept: list[Swept], results: list[Result]) -> str:
    """Names the members that have not finished, by state; the first of each where they are many."""
    parts = []
    for state in ("failed", "stopped", "running", "waiting"):
        unfinished = [result for result in results if result.member.state == state]
        if unfinished:
            named = "; ".join(f"{r.member.number} ({_words(r, swept)})" for r in unfinished[:6])
            parts.append(f"{state}: {named}" + (f" and {len(unfinished) - 6} more" if len(unfinished) > 6 else ""))
    return "\n".join(parts)


def _empty(axes: Any, words: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=FAINT)
