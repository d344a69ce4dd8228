"""The matrix T1 to T10 of parity: a covering part of it in every run of the tests, all of it by `make matrix`.

`make matrix` writes what it measured to docs/parity.md.
"""

import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from models.mixers import MIXERS
from parallel.sequence import TRANSPORTS
from tests.parallel import matrix
from tests.parallel.matrix import EFFECTS, KEYS, LAYOUTS, LENGTH, RANKS, Cell
from tests.parity import TOLERANCE

pytestmark = pytest.mark.dist

TABLE = Path(__file__).parents[2] / "docs" / "parity.md"
WORLD = 400  # cells that a world runs
Worst = tuple[float, str]


def worst(found: list[dict[str, float]]) -> Worst:
    """Over ranks: the largest difference and what differs; not a number is the largest of all."""
    largest = max(
        ((error, f"{name} on rank {rank}") for rank, errors in enumerate(found) for name, error in errors.items()),
        key=lambda e: np.inf if np.isnan(e[0]) else e[0],
    )
    return largest


def run_matrix(run, chosen: list[Cell], worlds: int = 1, timeout: float = 240) -> dict[Cell, Worst]:
    """Every cell by its worst difference; a world runs up to `WORLD` cells, and `worlds` of them run at a time."""
    known = matrix.truths(chosen)

    def found(part: list[Cell]) -> list[Worst]:
        needed = {key: known[key] for key in {(c.mixer, c.packing, c.precision) for c in part}}
        results = run(part[0].ranks, matrix.run_cells, part, needed, timeout=timeout)
        return [worst(list(of_ranks)) for of_ranks in zip(*results, strict=True)]

    by_ranks = [[cell for cell in chosen if cell.ranks == ranks] for ranks in reversed(RANKS)]
    parts = [cells[at : at + WORLD] for cells in by_ranks for at in range(0, len(cells), WORLD)]
    results: list[list[Worst]] = []
    with ThreadPoolExecutor(worlds) as pool:
        for part, result in zip(parts, pool.map(found, parts), strict=True):
            results.append(result)
            print(f"{sum(map(len, results)):,} of {len(chosen):,} cells, the last on {part[0].ranks} ranks", flush=True)
    measured = dict(zip(chain(*parts), chain(*results), strict=True))
    return {cell: measured[cell] for cell in chosen}


def red(measured: dict[Cell, Worst]) -> list[str]:
    return [
        f"{' | '.join(map(str, cell))}: {what} differs by {error:.2e}"
        for cell, (error, what) in measured.items()
        if not error <= TOLERANCE[cell.precision]
    ]


def test_a_covering_part_equals_one_process(run):
    """Any two of mixer, transport, layout, packing, ranks and precision that go together do so in some cell."""
    failed = red(run_matrix(run, matrix.covering()))
    assert not failed, "\n".join(failed)


def test_the_covering_part_covers():
    every, chosen = matrix.cells(), matrix.covering()
    assert {pair for cell in every for pair in matrix.pairs(cell)} == {
        pair for cell in chosen for pair in matrix.pairs(cell)
    }
    assert len(chosen) < len(every) / 50 and chosen == matrix.covering()


def test_the_matrix_has_every_mixer_and_every_transport():
    assert {mixer for mixer, _ in matrix.rows().values()} == set(MIXERS)
    for kind, used in (("recurrence", EFFECTS), ("attention", KEYS)):
        assert {name.split()[0] for name in used} == set(TRANSPORTS[kind]) - {"auto"}, "auto is one of the others"


def test_packings_and_layouts_are_what_their_names_say():
    packings, edges = matrix.packings(), set(matrix.edges())
    starts = {name: set(np.flatnonzero(p.positions == 0).tolist()) for name, p in packings.items()}
    for name, shift in (("starts on edges", 0), ("starts one before", -1), ("starts one after", 1)):
        assert starts[name] == {0} | {e + shift for e in edges}
    assert max(np.diff([*sorted(starts["shorter than the convolution"]), LENGTH])) == 3
    assert np.count_nonzero(np.diff(sorted(starts["one-token documents"])) == 1) > 20
    assert {len(p.tokens) for p in packings.values()} == {LENGTH, 4 * LENGTH}
    for name, p in packings.items():
        assert (p.targets != -100).any(), name
    for ranks in RANKS[1:]:
        (own,) = matrix.layout_spans("contiguous", ranks, LENGTH)[0]
        assert (packings["first ranks masked"].targets[slice(*own)] == -100).all()
        (own,) = matrix.layout_spans("contiguous", ranks, LENGTH)[-1]
        assert (packings["last ranks masked"].targets[slice(*own)] == -100).all()
        assert sum(not held for held in matrix.layout_spans("idle rank", ranks, LENGTH)) == 1
        assert len({e - b for held in matrix.layout_spans("unequal", ranks, LENGTH) for b, e in held}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("mixer", matrix.rows())
def test_fp32_can_solve_what_it_is_given(mixer):
    able = matrix.conditioned(mixer) or next((s for s in range(100) if matrix.conditioned(mixer, s)), None)
    assert able is True, f"SEEDS[{mixer!r}] = {able} would do"


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_the_whole_matrix_equals_one_process(run):
    began = time.time()
    measured = run_matrix(run, list(matrix.cells()), worlds=3, timeout=1800)
    TABLE.write_text(table(measured, time.time() - began))
    failed = red(measured)
    assert not failed, f"{len(failed)} of {len(measured)} cells\n" + "\n".join(failed[:50])


def table(measured: dict[Cell, Worst], seconds: float) -> str:
    """docs/parity.md."""
    failed = len(red(measured))
    largest = {
        precision: max(error for cell, (error, _) in measured.items() if cell.precision == precision)
        for precision in TOLERANCE
    }
    held = ", ".join(f"{largest[p]:.1e} in {p} (limit {TOLERANCE[p]:.0e})" for p in TOLERANCE)
    by_ranks = ", ".join(f"{sum(c.ranks == ranks for c in measured):,} on {ranks}" for ranks in RANKS)
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
            f"{len(measured):,} cells ({by_ranks} ranks) in {seconds:,.0f} seconds. Worst difference: {held}. Over the "
            f"limit: {failed}.",
            "",
            f"Packings: {', '.join(matrix.packings())}.",
            "",
            "Below, the worst over packings and ranks: fp64 / fp32. Ulysses runs where heads can be split among the",
            "ranks; an idle rank and unequal spans need two.",
            "",
            *_grid("States of recurrences", EFFECTS, measured, True),
            *_grid("Keys and values of softmax attention", KEYS, measured, False),
        ]
    )


def _grid(title: str, transports: dict, measured: dict[Cell, Worst], recurrent: bool) -> list[str]:
    columns = [(transport, layout) for transport in transports for layout in LAYOUTS]
    largest: dict[tuple, float] = defaultdict(float)
    for cell, (error, _) in measured.items():
        key = cell.mixer, cell.transport, cell.layout, cell.precision
        largest[key] = max(largest[key], np.inf if np.isnan(error) else error)
    lines = [f"## {title}", "", "| mixer | " + " | ".join(f"{t}, {layout}" for t, layout in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for mixer in matrix.rows():
        if matrix.recurrent(mixer) == recurrent:
            cells = (" / ".join(f"{largest[mixer, t, layout, p]:.0e}" for p in TOLERANCE) for t, layout in columns)
            lines.append(f"| {mixer} | " + " | ".join(cells) + " |")
    return [*lines, ""]
