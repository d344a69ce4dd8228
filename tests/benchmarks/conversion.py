"""The tables and the picture of docs/conversion.md: what a conversion costs, and how far the converted model reaches.

    python -m tests.benchmarks.conversion PICTURE.png RUNS

RUNS: the folder of the study's runs, of each seed N `convertedN` (`experiment=conversion_study_hybrid`), `reachN`
(`experiment=conversion_study_long`, evaluated), and the same with windows alone, `windowsN` and `reach_windowsN`. What
is not there is left out.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from launch.figures import LOOK, NAMES, figure_of, save

LOSS_AIM, EXACT_AIM, RATIO_AIM = 0.03, 0.8, 1.02  # nats a byte; share of the answers; loss beyond over loss within
KINDS = {"GLA beside a window": ("converted", "reach"), "windows alone": ("windows", "reach_windows")}
STAGES = ("untrained", "aligned", "distilled")


def gaps(chain: Path) -> list[float]:
    """The held-out loss of the parent, in nats a byte, then what it is above that after each stage that is measured."""
    losses = [stage["loss"]["loss"] for stage in json.loads((chain / "extension.json").read_text())["stages"]]
    return [losses[0], *(loss - losses[0] for loss in losses[1:])]


def reach(chain: Path) -> dict[str, Any]:
    """The parts that were measured of a chain's last stage."""
    found = [json.loads(path.read_text()) for path in chain.glob("2-*/evaluation/step-*/results.json")]
    return found[0] if found else {}


def numbered(runs: Path, name: str) -> list[Path]:
    """The runs of this name, in the order of their seeds."""
    return sorted(p for p in runs.glob(f"{name}[0-9]*") if (p / "extension.json").exists())


def band(axes: Any, seeds: list[dict[str, float]], label: str, colour: str) -> None:
    """The mean over the seeds that have a point, and from the least to the most of them; of each seed a value by x."""
    if seeds:
        x = list(max(seeds, key=len))
        columns = [[seed[key] for seed in seeds if key in seed] for key in x]
        means = [float(np.mean(column)) for column in columns]
        axes.plot(x, means, marker="o", markersize=4, color=colour, label=f"{label}: {len(seeds)}")
        axes.fill_between(
            x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, linewidth=0
        )


def main(picture: str, folder: str) -> None:
    import matplotlib

    runs = Path(folder)
    with matplotlib.rc_context(LOOK):
        figure, (cost, needle, beyond) = figure_of(11, 3.3, 3)
        for (label, (converted, reached)), colour in zip(KINDS.items(), NAMES, strict=False):
            chains = {chain: gaps(chain) for chain in numbered(runs, converted)}
            found = {chain: each for chain, each in chains.items() if len(each) == 1 + len(STAGES)}
            for chain, (parent, *each) in found.items():
                print(f"{chain.name}: parent {parent:.4f}, " + ", ".join(f"{gap:+.4f}" for gap in each))
            band(cost, [dict(zip(STAGES, each, strict=True)) for _, *each in found.values()], label, colour)
            exact, ratios = list[dict[str, float]](), list[dict[str, float]]()
            for chain in numbered(runs, reached):
                parts = reach(chain)
                if result := parts.get("needle"):
                    lengths = [f"{n:,}" for n in result["lengths"]]
                    right, nats = ([float(np.mean(row)) for row in result[key]] for key in ("exact", "logprob"))
                    exact.append(dict(zip(lengths, right, strict=True)))
                    cells = zip(lengths, right, nats, strict=True)
                    print(f"{chain.name}: needles {', '.join(f'{n} {e:.0%} ({p:.2f})' for n, e, p in cells)}")
                if result := parts.get("extrapolation"):
                    rows = result["octaves"][1:]
                    ratios.append({f"{row['to']:,}": row["matched"]["ratio"] for row in rows})
                    for row in rows:
                        texts = f"octave by octave {_ratio(row)}, the same targets {_ratio(row['matched'])}"
                        print(f"{chain.name}: from {row['from']:,} on, {texts}")
            band(needle, exact, label, colour)
            band(beyond, ratios, label, colour)
        for axes, aim in ((cost, LOSS_AIM), (needle, EXACT_AIM), (beyond, RATIO_AIM)):
            axes.axhline(aim, linestyle="--", linewidth=1, color="gray", label="aim")
        cost.set(ylim=(0, None), ylabel="nats a byte", title="Loss above the parent's")
        needle.set(ylim=(0, 1.03), xlabel="tokens", title="Needles answered exactly")
        beyond.set(xlabel="tokens before the same targets", title="Loss over that with 4,096 before")
        for axes in (cost, needle, beyond):
            axes.legend(title="seeds", title_fontsize=8)
        save(figure, Path(picture))


def _ratio(row: dict[str, Any]) -> str:
    """The loss beyond over that within, and its standard error."""
    return f"{row['ratio']:.4f} ± {row['error'] / (row['loss'] - row['rise']):.4f}"


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
