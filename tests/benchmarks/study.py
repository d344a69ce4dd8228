"""Sweeps of `experiment=mixer_study` as one table and one plot: what each mixer reaches, over seeds.

    python -m tests.benchmarks.study docs/images/mixer_study_tasks.png recall=runs/recall recall+attn=runs/hybrid …
    python -m tests.benchmarks.study docs/images/mixer_study_stdlib.png metric=heldout_loss text=runs/a text=runs/b

Each further word is a column of the table, its name and the folder of a sweep, of several where the name comes again;
`NAME+attn` is a sweep with `model.pattern=[mix,attn]`. Means over seeds, and standard deviations.
"""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

MIXER = "mixer@model.blocks.mix.mixer"

Values = dict[str, list[float]]  # by mixer, a number a seed


class Metric(NamedTuple):
    """A column of a sweep's table.csv. sign: -1 where less is better. show: how a number is written."""

    name: str
    label: str
    scale: float
    sign: int
    show: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric("heldout_accuracy", "answers right, %", 100, 1, "{:.1f}"),
        Metric("heldout_loss", "held-out loss, nats a token", 1, -1, "{:.3f}"),
    )
}


def read(folder: Path, metric: Metric, found: Values) -> None:
    """Adds the members of a sweep that are done."""
    with (folder / "table.csv").open() as lines:
        for row in csv.DictReader(lines):
            if row["state"] == "done":
                found[row[MIXER]].append(metric.scale * float(row[metric.name]))


def ranked(values: Values, metric: Metric) -> list[str]:
    """The best first."""
    return sorted(values, key=lambda mixer: -metric.sign * statistics.mean(values[mixer]))


def table(columns: dict[str, Values], metric: Metric) -> list[str]:
    """Markdown, the best of the first column first."""
    first = next(iter(columns.values()))
    rest = {mixer for values in columns.values() for mixer in values} - set(first)
    lines = [f"| mixer | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for mixer in [*ranked(first, metric), *sorted(rest)]:
        cells = [_cell(values.get(mixer, []), metric) for values in columns.values()]
        lines.append(f"| `{mixer}` | {' | '.join(cells)} |")
    return lines


def _cell(values: list[float], metric: Metric) -> str:
    if not values:
        return "–"
    deviation = f" ± {metric.show.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return metric.show.format(statistics.mean(values)) + deviation


def draw(columns: dict[str, Values], metric: Metric, path: Path) -> None:
    """A panel a task, a row a mixer, a point a seed; hybrids beside the pure ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(name.removesuffix("+attn") for name in columns))
    mixers = ranked(columns[tasks[0]], metric)[::-1]
    hybrids = len(columns) > len(tasks)
    height = 1 + 0.25 * len(mixers)
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), height), sharey=True, squeeze=False)
    for task, panel in zip(tasks, panels[0], strict=True):
        for name, colour, shift in ((task, "C0", 0.12 * hybrids), (f"{task}+attn", "C1", -0.12)):
            for mixer, values in columns.get(name, {}).items():
                label = {"C0": "alone", "C1": "one layer softmax"}[colour]
                panel.plot(values, [mixers.index(mixer) + shift] * len(values), "o", color=colour, ms=5, label=label)
        panel.set(title=task, xlabel=metric.label)
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(mixers)), mixers)
    if hybrids:
        handles = dict(zip(*panels[0][0].get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)


def main(picture: str, *words: str) -> None:
    metric = METRICS["heldout_accuracy"]
    columns: dict[str, Values] = defaultdict(lambda: defaultdict(list))
    for name, _, value in (word.partition("=") for word in words):
        if name == "metric":
            metric = METRICS[value]
        else:
            read(Path(value), metric, columns[name])
    print("\n".join(table(columns, metric)))
    draw(columns, metric, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
