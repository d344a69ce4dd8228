"""docs/parity.md: what `make matrix` measured, a row a mixer, each of the commit that it was measured at.

The rows are kept beside it in docs/parity.json, so that one row can be measured again without the others.
"""

import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.parallel import matrix
from tests.parallel.matrix import EFFECTS, KEYS, LAYOUTS, RANKS, Cell
from tests.parity import TOLERANCE

DOCS = Path(__file__).parents[2] / "docs"
ROWS = DOCS / "parity.json"


def keep(mixer: str, measured: dict[Cell, tuple[float, str]]) -> None:
    """Puts a mixer's cells, each with its worst difference, in the place of its row, and writes the page."""
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    largest: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(TOLERANCE, 0.0))
    for cell, (error, _) in measured.items():
        column = largest[f"{cell.transport}, {cell.layout}"]
        column[cell.precision] = max(column[cell.precision], np.inf if np.isnan(error) else error)
    rows[mixer] = {
        "commit": commit(),
        "cells": {str(ranks): sum(cell.ranks == ranks for cell in measured) for ranks in RANKS},
        "worst": {name: [float(f"{column[p]:.1e}") for p in TOLERANCE] for name, column in largest.items()},
    }
    kept = {name: rows[name] for name in matrix.rows() if name in rows}
    lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in kept.items())
    ROWS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (DOCS / "parity.md").write_text(page(kept))


def commit() -> str:
    """What is measured: a commit, marked where files other than this page differ from it."""

    def told(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=DOCS.parent, capture_output=True, text=True).stdout.strip()

    changed = told("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return (told("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def page(rows: dict[str, Any]) -> str:
    """docs/parity.md from docs/parity.json."""
    worst = [max(pair[i] for row in rows.values() for pair in row["worst"].values()) for i in range(len(TOLERANCE))]
    held = ", ".join(f"{w:.0e} in {p} (limit {TOLERANCE[p]:.0e})" for p, w in zip(TOLERANCE, worst, strict=True))
    by_ranks = {ranks: sum(row["cells"][str(ranks)] for row in rows.values()) for ranks in RANKS}
    split = ", ".join(f"{number:,} on {ranks}" for ranks, number in by_ranks.items())
    return "\n".join(
        [
            "# Sequence parallelism against one process",
            "",
            "Written by `make matrix`. Each cell runs a packed sequence through a small model on some ranks, and holds",
            "to one process: the loss, the output and the gradient at each layer's input for every rank's tokens, and",
            "every parameter's gradient on every rank. A difference is ‖a - b‖ / ‖b‖. Weights are such that one",
            "process in fp32 is within 7e-6 of itself in fp64: some gradients are what a cancellation leaves, and say",
            "nothing otherwise.",
            "",
            f"{sum(by_ranks.values()):,} cells ({split} ranks). Worst difference: {held}.",
            "",
            f"Packings: {', '.join(matrix.packings())}.",
            "",
            "Below, the worst over packings and ranks: fp64 / fp32. Ulysses runs where heads can be split among the",
            "ranks; an idle rank and unequal spans need two. Non-affine recurrences (`slstm`, `lact`) are relayed,",
            "whatever the transport; `lact` is held in fp64 alone: in fp32 one process is over 1e-5 from itself",
            "in fp64. So are keys in int8, since those that differ in their last bit may get codes that differ; one",
            "process rounds them where it attends.",
            "",
            *_grid("States of recurrences", EFFECTS, {n: row for n, row in rows.items() if matrix.recurrent(n)}),
            *_grid(
                "Keys and values of softmax attention", KEYS, {n: r for n, r in rows.items() if not matrix.recurrent(n)}
            ),
        ]
    )


def _grid(title: str, transports: dict, rows: dict[str, Any]) -> list[str]:
    columns = [f"{transport}, {layout}" for transport in transports for layout in LAYOUTS]
    lines = [f"## {title}", "", f"| mixer | {' | '.join(columns)} | commit |", "|---" * (len(columns) + 2) + "|"]
    for mixer, row in rows.items():
        pairs = (row["worst"].get(column) for column in columns)
        cells = (
            "–" if pair is None else " / ".join(f"{error:.0e}" if error else "–" for error in pair) for pair in pairs
        )
        lines.append(f"| {mixer} | {' | '.join(cells)} | {row['commit']} |")
    return [*lines, ""]
