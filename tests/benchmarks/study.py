"""Sweeps of `experiment=mixer_study` as one table and one plot: what share of a task's answers each mixer gives right.

    python -m tests.benchmarks.study docs/images/mixer_study_tasks.png recall=runs/recall recall+attn=runs/hybrid …

Each further word is a column of the table, its name and the folder of a sweep; `NAME+attn` is a sweep with
`model.pattern=[mix,attn]`. Means over seeds, and standard deviations.
"""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

MIXER = "mixer@model.blocks.mix.mixer"

Shares = dict[str, list[float]]  # by mixer, a number a seed


def read(folder: Path) -> Shares:
    """Of a sweep's table.csv, the members that are done."""
    found: Shares = defaultdict(list)
    with (folder / "table.csv").open() as lines:
        for row in csv.DictReader(lines):
            if row["state"] == "done":
                found[row[MIXER]].append(100 * float(row["heldout_accuracy"]))
    return found


def table(columns: dict[str, Shares]) -> list[str]:
    """Markdown, the best of the first column first."""
    mixers = {mixer for shares in columns.values() for mixer in shares}
    first = next(iter(columns.values()))
    lines = [f"| mixer | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for mixer in sorted(mixers, key=lambda m: -statistics.mean(first.get(m, [0.0]))):
        cells = [_cell(shares.get(mixer, [])) for shares in columns.values()]
        lines.append(f"| `{mixer}` | {' | '.join(cells)} |")
    return lines


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def draw(columns: dict[str, Shares], path: Path) -> None:
    """A panel a task, a row a mixer, a point a seed; hybrids beside the pure ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(name.removesuffix("+attn") for name in columns))
    first = columns[tasks[0]]
    mixers = sorted(first, key=lambda m: statistics.mean(first[m]))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 4.5), sharey=True, squeeze=False)
    for task, panel in zip(tasks, panels[0], strict=True):
        for name, colour, shift in ((task, "C0", 0.12), (f"{task}+attn", "C1", -0.12)):
            for mixer, values in columns.get(name, {}).items():
                label = {"C0": "alone", "C1": "one layer softmax"}[colour]
                panel.plot(values, [mixers.index(mixer) + shift] * len(values), "o", color=colour, ms=5, label=label)
        panel.set(title=task, xlabel="answers right, %", xlim=(-3, 103))
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(mixers)), mixers)
    handles = dict(zip(*panels[0][0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)


def main(picture: str, *sweeps: str) -> None:
    columns = {name: read(Path(folder)) for name, _, folder in (word.partition("=") for word in sweeps)}
    print("\n".join(table(columns)))
    draw(columns, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
