"""A chain's stages beside each other: a table, and a picture."""

from pathlib import Path
from typing import Any

from launch.evaluation.report import columns
from launch.figures import LOOK, NAMES, figure_of, save


def table(facts: dict[str, Any]) -> list[str]:
    """Rows of each stage: the answer's log-probability, meaned over depths, by length; and the loss of the last
    positions."""
    stages = facts["stages"]
    lengths = sorted({n for stage in stages for n in stage.get("needle", {}).get("lengths", [])})
    last = max((row["from"] for stage in stages for row in stage.get("positions", [])), default=0)
    head = [f"needle at {n:,}" for n in lengths]
    head += [f"loss from {last:,} on"] if last else []
    whole = any("loss" in stage for stage in stages)
    head += ["held-out loss"] if whole else []
    rows = []
    for stage in stages:
        cells = [_needle(stage, n) for n in lengths]
        if last:
            losses = [row["loss"] for row in stage.get("positions", []) if row["from"] == last]
            cells.append(f"{losses[0]:.4f}" if losses else "")
        if whole:
            cells.append(f"{stage['loss']['loss']:.4f}" if "loss" in stage else "")
        rows.append([stage["name"], *cells])
    far = [stage for stage in stages if stage.get("extrapolation", {}).get("octaves")]
    verdicts = [f"{stage['name']}: {stage['extrapolation']['verdict']}" for stage in far]
    name = "stage (needle: nats, exact)" if lengths else "stage"
    return [*columns(head, rows, name), *verdicts]


def _needle(stage: dict[str, Any], length: int) -> str:
    needle = stage.get("needle", {})
    if length not in needle.get("lengths", []):
        return ""
    i = needle["lengths"].index(length)
    nats, exact = (sum(needle[key][i]) / len(needle[key][i]) for key in ("logprob", "exact"))
    return f"{nats:.2f} ({exact:.0%})"


def draw(path: Path, facts: dict[str, Any]) -> None:
    """A panel for each length of needles (at most three: the shortest, one between, the longest), and one of the loss
    by position, from a sixteenth of the trained length on; a line a stage in each."""
    import matplotlib

    stages = facts["stages"]
    lengths = sorted({n for stage in stages for n in stage.get("needle", {}).get("lengths", [])})
    shown = lengths if len(lengths) < 4 else [lengths[0], lengths[len(lengths) // 2], lengths[-1]]
    worst = min((min(row) for stage in stages for row in stage.get("needle", {}).get("logprob", [])), default=-1.0)
    near = (facts["trained"] or 0) // 16  # what stands closer is not what an extension is about
    with matplotlib.rc_context(LOOK):
        figure, panels = figure_of(3.4 * (len(shown) + 1), 3.4, len(shown) + 1)
        for axes, length in zip(panels, shown, strict=False):
            for i, stage in enumerate(stages):
                needle = stage.get("needle", {})
                if length in needle.get("lengths", []):
                    nats = needle["logprob"][needle["lengths"].index(length)]
                    axes.plot(
                        [100 * depth for depth in needle["depths"]], nats, color=_colour(i), marker="o", markersize=4
                    )
            axes.set(xlabel="depth of the needle, %", title=f"Needle in {length:,} tokens")
            axes.set_ylim(1.05 * worst, -0.03 * worst)
        if shown:
            panels[0].set_ylabel("log-probability of the answer, nats")
        for i, stage in enumerate(stages):
            rows = [row for row in stage.get("positions", []) if row["from"] >= near]
            panels[-1].plot(
                [row["from"] for row in rows],
                [row["loss"] for row in rows],
                color=_colour(i),
                marker="o",
                markersize=3,
                label=stage["name"],
            )
        panels[-1].set_xscale("log", base=2)
        panels[-1].set(xlabel="tokens of the document before it, from", title="Held-out loss by position, nats")
        panels[-1].legend(fontsize=8, frameon=False)
        save(figure, path)


def _colour(stage: int) -> str:
    return NAMES[stage % len(NAMES)]
