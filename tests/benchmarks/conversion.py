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


def band(axes: Any, x: list[str], rows: list[list[float]], label: str, colour: str) -> None:
    """The mean over the seeds, and from the least to the most of them."""
    if rows:
        means = np.mean(rows, axis=0)
        axes.plot(x, means, marker="o", markersize=4, color=colour, label=f"{label}: {len(rows)}")
        axes.fill_between(x, np.min(rows, axis=0), np.max(rows, axis=0), color=colour, alpha=0.15, linewidth=0)


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
            band(cost, list(STAGES), [each for _, *each in found.values()], label, colour)
            exact, ratios = dict[str, list[float]](), dict[str, list[float]]()
            lengths, octaves = list[str](), list[str]()
            for chain in numbered(runs, reached):
                parts = reach(chain)
                if result := parts.get("needle"):
                    exact[chain.name] = [float(np.mean(row)) for row in result["exact"]]
                    nats = [float(np.mean(row)) for row in result["logprob"]]
                    lengths = [f"{n:,}" for n in result["lengths"]]
                    cells = zip(lengths, exact[chain.name], nats, strict=True)
                    print(f"{chain.name}: needles {', '.join(f'{n} {e:.0%} ({p:.2f})' for n, e, p in cells)}")
                if result := parts.get("extrapolation"):
                    rows = result["octaves"][1:]
                    ratios[chain.name] = [row["matched"]["ratio"] for row in rows]
                    octaves = [f"{row['to']:,}" for row in rows]
                    for row in rows:
                        texts = f"octave by octave {_ratio(row)}, the same targets {_ratio(row['matched'])}"
                        print(f"{chain.name}: from {row['from']:,} on, {texts}")
            band(needle, lengths, list(exact.values()), label, colour)
            band(beyond, octaves, list(ratios.values()), label, colour)
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
