"""What the arms of a sweep of `experiment=decomposition` reached, for the processor time and the attention they took.

    farspan sweep experiment=decomposition,decomposition_grow_p2,decomposition_best_fit,decomposition_concat seed=0,1,2
    python -m tests.benchmarks.decomposition SWEEP [SWEEP ...] [docs/images/decomposition.png]

Prints a table: held-out loss at the end, processor seconds of all training steps, and FLOPs of softmax attention, each
with the spread over seeds (largest less smallest); and how much of each an arm needed for the loss that the worst arm
ends with, read off its evaluations. Draws the evaluations of every run against both. The work of attention is computed
from the batches themselves, which are a function of (seed, step).
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from models.accounting import account
from train.metrics.timing import pieces
from train.tracking.record import records


@dataclass
class Run:
    """One member: its arm, and of each evaluation the processor seconds, attention FLOPs and held-out loss by then."""

    arm: str
    cpu: np.ndarray
    attention: np.ndarray
    loss: np.ndarray


def read(folder: Path) -> Run:
    """Of a run's folder. Raises ValueError where it has no evaluation."""
    import torch

    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    batches = config.data.build().open(config.train.batch_tokens, config.curriculum.build())
    with torch.device("meta"):
        model = config.model.build()
    costs = account(model, device="cpu")
    plain = sum(costs.per_token[:2])  # what a token costs besides
    cpu = attention = 0.0
    rows = []
    for record in records(folder / "metrics.jsonl"):
        lengths = [n for s in batches.batch(config.seed, record["step"] - 1) for n in pieces(s.starts)]
        attention += costs.flops(lengths).model - plain * sum(lengths)
        cpu += record["cpu_seconds"]
        if record.get("heldout_loss") is not None:
            rows.append((cpu, attention, record["heldout_loss"]))
    if not rows:
        raise ValueError(f"{folder}: has no evaluation")
    odds = config.curriculum["odds"]
    arm = config.data["packing"] + (f", {odds}" if config.data["packing"] == "decomposition" else "")
    return Run(arm, *np.array(rows).T)


def needed(run: Run, cost: np.ndarray, loss: float) -> float:
    """What a run had spent when its held-out loss came down to `loss`, between two evaluations by a straight line."""
    below = np.flatnonzero(run.loss <= loss)
    if not below.size:
        return float("nan")
    last = int(below[0])
    if last == 0:
        return float(cost[0])
    share = (run.loss[last - 1] - loss) / (run.loss[last - 1] - run.loss[last])
    return float(cost[last - 1] + share * (cost[last] - cost[last - 1]))


def table(runs: list[Run]) -> list[str]:
    """Its lines: an arm each."""
    arms = defaultdict(list)
    for run in runs:
        arms[run.arm].append(run)
    worst = max(run.loss[-1] for run in runs)
    lines = [
        "| arm | runs | held-out loss | CPU seconds | attention FLOPs | CPU s to the worst loss | attention to it |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, found in sorted(arms.items(), key=lambda item: float(np.mean([run.loss[-1] for run in item[1]]))):
        columns = [
            _spread([run.loss[-1] for run in found], "{:.4f}"),
            _spread([run.cpu[-1] for run in found], "{:.0f}"),
            _spread([run.attention[-1] for run in found], "{:.3g}"),
            _spread([needed(run, run.cpu, worst) for run in found], "{:.0f}"),
            _spread([needed(run, run.attention, worst) for run in found], "{:.3g}"),
        ]
        lines.append(f"| {arm} | {len(found)} | {' | '.join(columns)} |")
    return lines


def _spread(values: list[float], how: str) -> str:
    return f"{how.format(np.mean(values))} ({how.format(max(values) - min(values))})"


def draw(runs: list[Run], path: Path) -> None:
    """Held-out loss of every run against processor time and against attention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    colours = {arm: f"C{i}" for i, arm in enumerate(sorted({run.arm for run in runs}))}
    for run in runs:
        label = run.arm if run is next(r for r in runs if r.arm == run.arm) else None
        for axis, cost in zip(axes, (run.cpu, run.attention), strict=True):
            axis.plot(cost, run.loss, "o-", color=colours[run.arm], markersize=3, linewidth=1, label=label)
    axes[0].set(xlabel="processor seconds of training", ylabel="held-out loss, nats a byte")
    axes[1].set(xlabel="FLOPs of softmax attention")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(*arguments: str) -> None:
    sweeps = [a for a in arguments if not a.endswith(".png")]
    runs = []
    for path in sorted(path for sweep in sweeps for path in Path(sweep).glob("*/metrics.jsonl")):
        try:
            runs.append(read(path.parent))
        except ValueError as error:
            print(error, file=sys.stderr)
    print("\n".join(table(runs)))
    for picture in set(arguments) - set(sweeps):
        draw(runs, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
