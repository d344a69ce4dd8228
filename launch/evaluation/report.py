"""An evaluation's results for a person: a table on the terminal, and pictures beside the numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.figures import INK, LOOK, NAMES, figure_of, save

BLUE = NAMES[0]


def table(results: dict[str, Any], parts: Sequence[str]) -> list[str]:
    """The numbers of these parts, in lines."""
    lines: list[str] = []
    for part in parts:
        if part in results:
            lines += ["", *_PARTS[part](results[part])]
    return lines[1:]


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> list[str]:
    """The first column to the left, numbers to the right."""
    cells = [[name, *head], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _loss(loss: dict[str, Any]) -> list[str]:
    def row(name: str, facts: dict[str, Any]) -> list[str]:
        counts = [f"{facts['documents']:,}", f"{facts['targets']:,}"]
        return [name, *counts, f"{facts['loss']:.4f}", f"{facts['accuracy']:.1%}"]

    rows = [row("all", loss)]
    if len(loss["sources"]) > 1:
        rows += [row(f"  {name}", facts) for name, facts in loss["sources"].items()]
    rows += [row(f"  {_from(facts)} tokens", facts) for facts in loss["lengths"]]
    parts = [f"per byte: {loss['loss_per_byte']:.4f}"] if "loss_per_byte" in loss else []
    return columns(["documents", "targets", "nats", "right"], rows, "held-out loss") + parts


def _positions(entries: list[dict[str, Any]]) -> list[str]:
    rows = [[_from(r), f"{r['targets']:,}", f"{r['loss']:.4f}", f"{r['accuracy']:.1%}"] for r in entries]
    return columns(["targets", "nats", "right"], rows, "tokens before")


def _extrapolation(result: dict[str, Any]) -> list[str]:
    if not result["octaves"]:
        return [f"extrapolation: held-out text has no {2 * result['trained']:,} tokens on end"]
    rows = []
    for row in result["octaves"]:
        same = row.get("matched")
        rise = [*_risen(row), f"{same['within']:.4f}", f"{same['loss']:.4f}", *_risen(same)] if same else [""] * 6
        rows.append([f"{row['from']:,} to {row['to'] - 1:,}", f"{row['loss']:.4f}", *rise])
    head = ["nats", "rise", "ratio", f"last {result['trained']:,}", "all before", "rise", "ratio"]
    text = "documents" if result["whole"] else "stretches of documents end to end"
    verdict = f"{result['sequences']} {text}, trained on {result['trained']:,} tokens: {result['verdict']}"
    same = f"from the fourth column on: the octave's last {max(result['trained'] // 4, 1):,} targets, by what is read"
    return [*columns(head, rows, "extrapolation, tokens before"), same, verdict]


def _risen(row: dict[str, Any]) -> list[str]:
    spread = "" if row["error"] is None else f" ± {row['error']:.4f}"
    return [f"{row['rise']:+.4f}{spread}", f"{row['ratio']:.3f}"]


def _needle(result: dict[str, Any]) -> list[str]:
    head = [f"{length:,}" for length in result["lengths"]]
    if not head:
        return ["needle: no length has room for one"]
    rows = [
        [f"{depth:.0%} deep", *(f"{e[d]:.0%} ({p[d]:.1f})" for e, p in zip(*_grids(result), strict=True))]
        for d, depth in enumerate(result["depths"])
    ]
    return columns(head, rows, "needle: exact (nats)")


def _grids(results: dict[str, Any]) -> tuple[list[list[float]], list[list[float]]]:
    return results["exact"], results["logprob"]


def _asked(name: str) -> Any:
    def lines(result: dict[str, Any]) -> list[str]:
        rows = [[f"{r['length']:,}", f"{r['accuracy']:.1%}", f"{r['loss']:.3f}"] for r in result["lengths"]]
        return columns(["right", "nats"], rows, f"{name} (guess: {result['chance']:.1%})")

    return lines


def _long_range(result: dict[str, Any]) -> list[str]:
    if not result["lengths"]:
        return [f"long range: no held-out document has the {2 * result['context']:,} tokens that it takes"]
    rows = [
        [f"{r['length']:,}", str(r["documents"]), f"{r['full']:.4f}", f"{r['near']:.4f}", _gain(r)]
        for r in result["lengths"]
    ]
    head = ["documents", "all before", f"last {result['context']:,}", "gain"]
    return columns(head, rows, "long range, tokens")


def _gain(row: dict[str, Any]) -> str:
    return f"{row['gain']:+.4f}" + (f" ± {row['error']:.4f}" if row["error"] is not None else "")


def _tasks(results: dict[str, Any]) -> list[str]:
    rows = [
        [task, metric.partition(",")[0], f"{value:.4f}"]
        for task, numbers in results.items()
        for metric, value in numbers.items()
        if isinstance(value, float)
    ]
    return columns(["metric", "value"], rows, "lm-eval")


def _from(facts: dict[str, Any]) -> str:
    return f"{facts['from']:,} to {2 * facts['from'] - 1:,}" if facts["from"] > 1 else "1"


_PARTS: dict[str, Any] = {
    "loss": _loss,
    "positions": _positions,
    "needle": _needle,
    "recall": _asked("recall"),
    "copy": _asked("copy"),
    "long_range": _long_range,
    "extrapolation": _extrapolation,
    "tasks": _tasks,
}


def draw(folder: Path, results: dict[str, Any]) -> list[str]:
    """Writes a PNG of each part that has a picture; their names."""
    import matplotlib

    pictures = {"loss": _draw_lengths, "positions": _draw_positions, "needle": _draw_needle}
    names = []
    with matplotlib.rc_context(LOOK):
        for part, picture in pictures.items():
            if results.get(part) and not (part == "needle" and not results[part]["lengths"]):
                picture(folder / f"{part}.png", results)
                names.append(f"{part}.png")
    return names


def _draw_lengths(path: Path, results: dict[str, Any]) -> None:
    rows = results["loss"]["lengths"]
    figure, (axes,) = figure_of(6.4, 3.6)
    axes.bar(range(len(rows)), [row["loss"] for row in rows], color=BLUE, width=0.7)
    size = 8 if len(rows) <= 12 else 6.5
    for x, row in enumerate(rows):
        axes.annotate(count(row["documents"]), (x, row["loss"]), ha="center", va="bottom", fontsize=size, color=INK)
    ticks(axes, "x", [f"{row['from']:,}" for row in rows])
    axes.margins(y=0.1)
    title = "Held-out loss by length (on each bar: how many documents)"
    axes.set(xlabel="tokens of the document, from", ylabel="nats a token", title=title)
    save(figure, path)


def count(number: int) -> str:
    """A number that a bar has room for: 950, 12k, 3.4M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            unit = 1000 if letter == "k" else size
            return f"{number / unit:.3g}{letter}"
    return f"{number:,}"


MOST_TICKS = 12  # labels beside each other that have room


def ticks(axes: Any, axis: str, labels: Sequence[str]) -> None:
    """A label a place, as many as do not overlap: the first, the last, and some between, evenly."""
    step = -(-len(labels) // MOST_TICKS)
    at = [i for i in range(len(labels)) if i % step == 0]
    rotation = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if axis == "x" else {}
    getattr(axes, f"set_{axis}ticks")(at, [labels[i] for i in at], **rotation)


def _draw_positions(path: Path, results: dict[str, Any]) -> None:
    rows = results["positions"]
    figure, (axes,) = figure_of(6.4, 3.6)
    axes.plot([row["from"] for row in rows], [row["loss"] for row in rows], color=BLUE, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of the document before it, from", ylabel="nats a token", title="Held-out loss by position")
    save(figure, path)


def _draw_needle(path: Path, results: dict[str, Any]) -> None:
    """Colours go over the range of the data, and the bar beside them says which that is."""
    result = results["needle"]
    wide, high = len(result["lengths"]), len(result["depths"])
    figure, panels = figure_of(max(9.6, 1.5 * wide + 3.2), 0.5 * high + 1.8, 2)
    exact, logprob = _grids(result)
    scales = (
        (exact, "answers that are exact", "viridis", "{:.0%}"),
        (logprob, "nats of the answer", "cividis", "{:.1f}"),
    )
    for axes, (grid, title, colours, text) in zip(panels, scales, strict=True):
        columns = list(zip(*grid, strict=True))  # depth by length
        least, most = min(map(min, grid)), max(map(max, grid))
        span = (most - least) or 1e-9
        image = axes.imshow(columns, cmap=colours, vmin=least, vmax=least + span, aspect="auto")
        for y, row in enumerate(columns):
            for x, value in enumerate(row):
                dark = (value - least) / span < 0.6
                axes.text(
                    x, y, text.format(value), ha="center", va="center", color="white" if dark else INK, fontsize=8
                )
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30, ticks=[least, most] if most > least else [least])
        bar.ax.set_yticklabels([text.format(value) for value in dict.fromkeys((least, most))])
        bar.outline.set_visible(False)
        ticks(axes, "x", [f"{n:,}" for n in result["lengths"]])
        ticks(axes, "y", [f"{d:.0%}" for d in result["depths"]])
        axes.grid(False)
        depths = f"{text.format(least)} to {text.format(most)}" if most > least else f"{text.format(least)} everywhere"
        axes.set(xlabel="tokens", ylabel="depth of the needle", title=f"Needle: {title} ({depths})")
    save(figure, path)
