"""What the arms of a sweep of `experiment=continual` forget and learn, beside training on both corpora from scratch.

    python -m tests.benchmarks.continual runs/continual runs/union [docs/images/continual.png]

Prints a table: at the end, the held-out loss on the old and on the new corpus and their mean, what was forgotten and
learnt since the first step, means and standard deviations over seeds; and how many of the latter lie between what is
forgotten without replay and with a quarter. Draws both losses over the tokens of the run, a band from the least to the
largest of the seeds. The sweeps of docs/continual.md, about an hour on one core:

    M="model=mixer_study model.dim=128 model.pattern=[mix,attn] cluster=none cluster.workers=1 cluster.threads=1
       tracking=none data.max_length=512 data.heldout_tokens=65_536 optimizer.lr=5e-3 train.checkpoint_every=null"
    NEW="data.sources.new.data.corpus=headers data.sources.new.data.path=null"
    for seed in 0 1 2; do farspan train $M schedule=cosine train.tokens=1_500_000 seed=$seed run.name=old-$seed; done
    farspan sweep experiment=continual $M $NEW schedule=rewarm,anneal schedule.floor=0.1 data.replay=0,0.05,0.25
        seed=0,1,2 'init_from=old-${seed}' train.init_optimizer=keep train.tokens=1_000_000
        train.evaluate_every=250_000 run.name=continual
    farspan sweep $M $NEW data=mixture data.replay=0.6 schedule=cosine seed=0,1,2 train.tokens=2_500_000
        train.evaluate_every=500_000 run.name=union
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from launch.figures import INK, LOOK, NAMES
from train.tracking.record import records

ARMS = {"Cosine": "re-warmed", "Anneal": "at its last rate"}  # by the class of the schedule


@dataclass(frozen=True)
class Run:
    """One member. replay: the share of the old corpus. rate: how the learning rate went. tokens, and the losses on each
    corpus, of every evaluation."""

    replay: float
    rate: str
    tokens: list[int]
    old: list[float]
    new: list[float]

    @property
    def arm(self) -> str:
        return f"{self.rate}, {self.replay:.0%} replay"


def read(folder: Path) -> Run:
    """Of a run's folder. One that starts from nothing is `from scratch`."""
    config: Any = OmegaConf.load(folder / "config.yaml")
    scored = [r for r in records(folder / "metrics.jsonl") if "heldout" in r]
    rate = ARMS[config.schedule._target_.rpartition(".")[2]] if config.init_from else "from scratch"
    losses = {side: [r["heldout"][side]["loss"] for r in scored] for side in ("old", "new")}
    return Run(config.data.replay, rate, [r["tokens"] for r in scored], losses["old"], losses["new"])


def by_arm(runs: list[Run]) -> dict[str, list[Run]]:
    found = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r.rate != "re-warmed", r.rate == "from scratch", r.replay)):
        found[run.arm].append(run)
    return found


def table(runs: list[Run]) -> list[str]:
    lines = ["| | runs | old | new | mean | forgotten | learnt |", "|---|---|---|---|---|---|---|"]
    for arm, found in by_arm(runs).items():
        new = found[0].rate == "from scratch"
        columns = [[r.old[-1] for r in found], [r.new[-1] for r in found], [(r.old[-1] + r.new[-1]) / 2 for r in found]]
        columns += [] if new else [[r.old[-1] - r.old[0] for r in found], [r.new[0] - r.new[-1] for r in found]]
        lines.append(f"| {arm} | {len(found)} | {' | '.join(map(_spread, columns))} |{' – | – |' if new else ''}")
    return lines


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def gates(runs: list[Run]) -> list[str]:
    """How far forgetting without replay and with a quarter are apart, in standard deviations of both together."""
    lines = []
    for rate in ARMS.values():
        lost = {
            share: [r.old[-1] - r.old[0] for r in runs if (r.rate, r.replay) == (rate, share)] for share in (0, 0.25)
        }
        if min(map(len, lost.values())) > 1:
            gap, deviation = mean(lost[0]) - mean(lost[0.25]), hypot(*map(stdev, lost.values()))
            lines.append(f"{rate}: a quarter of replay forgets {gap:.3f} nats less, {gap / deviation:.1f} deviations")
    return lines


def draw(runs: list[Run], path: Path) -> None:
    """The loss on each corpus over the tokens of the second run."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = sorted({run.replay for run in runs if run.rate != "from scratch"})
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(9.5, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        panels: Any = figure.subplots(1, 2)
        for arm, found in by_arm(runs).items():
            run = found[0]
            for panel, side in zip(panels, ("old", "new"), strict=True):
                values = np.array([getattr(r, side) for r in found])
                if run.rate == "from scratch":
                    panel.axhline(values[:, -1].mean(), color=INK, lw=1, ls=(0, (1, 1.5)), label="both, from scratch")
                    continue
                colour, dashes = NAMES[shares.index(run.replay)], "-" if run.rate == "re-warmed" else (0, (4, 1.5))
                panel.fill_between(run.tokens, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
                panel.plot(run.tokens, values.mean(0), color=colour, ls=dashes, lw=1.5, label=arm)
        panels[0].set(title="old corpus: what is forgotten", ylabel="held-out loss, nats a byte")
        panels[1].set(title="new corpus: what is learnt")
        for panel in panels:
            panel.set_xlabel("tokens of the second run")
            panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value else "0")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=120)


def main(*arguments: str) -> None:
    sweeps = [a for a in arguments if not a.endswith(".png")]
    runs = [read(path.parent) for sweep in sweeps for path in sorted(Path(sweep).glob("*/summary.json"))]
    print("\n".join(table(runs) + [""] + gates(runs)))
    for picture in set(arguments) - set(sweeps):
        draw(runs, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
