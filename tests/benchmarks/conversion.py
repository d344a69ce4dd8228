"""The picture of docs/conversion.md: the loss that a conversion costs, stage by stage, a line a seed.

    python -m tests.benchmarks.conversion PICTURE.png CHAIN…

CHAIN: the folder of a run of `experiment=conversion_study_hybrid`.
"""

import json
import sys
from pathlib import Path

from launch.figures import LOOK, figure_of, save

AIM = 0.03  # nats a byte


def gaps(chain: Path) -> dict[str, float]:
    """The held-out loss of each stage less that of the parent, in nats a byte, by the stage's name."""
    stages = json.loads((chain / "extension.json").read_text())["stages"]
    before = next(stage["loss"]["loss"] for stage in stages if stage["name"] == "before")
    return {stage["name"]: stage["loss"]["loss"] - before for stage in stages if stage["name"] != "before"}


def main(picture: str, *chains: str) -> None:
    import matplotlib

    with matplotlib.rc_context(LOOK):
        figure, (axes,) = figure_of(6, 3.2)
        for i, chain in enumerate(chains):
            found = gaps(Path(chain))
            names = ["windows alone", "aligned", "distilled"]
            axes.plot(names, list(found.values()), marker="o", label=f"seed {i + 1}")
            print(f"{chain}: " + ", ".join(f"{name} {gap:+.4f}" for name, gap in found.items()))
        axes.axhline(AIM, linestyle="--", linewidth=1, color="gray", label="aim")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("loss above the parent's, nats a byte")
        axes.legend()
        save(figure, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
