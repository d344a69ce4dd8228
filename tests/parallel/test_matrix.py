"""The matrix T1 to T10 of parity: a covering part of it in every run of the tests, all of it by `make matrix`.

`make matrix` writes what it measured to docs/parity.md, a row at a time; `make matrix ARGS="-k '[gla]'"` one row.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest

from models.mixers import MIXERS
from parallel.sequence import TRANSPORTS
from tests.parallel import matrix, parity_table
from tests.parallel.matrix import EFFECTS, KEYS, LENGTH, RANKS, Cell
from tests.parity import TOLERANCE

pytestmark = pytest.mark.dist

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


@pytest.mark.parametrize("packings_by_mixer", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_covering_part_equals_one_process(run, packings_by_mixer):
    """Any two of mixer, transport, layout, packing, ranks and precision that go together do so in some cell; a mixer
    and a packing in `make slow`."""
    failed = red(run_matrix(run, matrix.covering(packings_by_mixer=packings_by_mixer)))
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("packings_by_mixer", "pairs", "share"),
    [(False, matrix.quick_pairs, 200), pytest.param(True, matrix.every_pair, 50, marks=pytest.mark.slow)],
)
def test_the_covering_part_covers(packings_by_mixer, pairs, share):
    every, chosen = matrix.cells(), matrix.covering(packings_by_mixer=packings_by_mixer)
    assert {pair for cell in every for pair in pairs(cell)} == {pair for cell in chosen for pair in pairs(cell)}
    assert len(chosen) < len(every) / share and chosen == matrix.covering(packings_by_mixer=packings_by_mixer)


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
@pytest.mark.parametrize("mixer", sorted(set(matrix.rows()) - matrix.IN_FP64))
def test_fp32_can_solve_what_it_is_given(mixer):
    able = matrix.conditioned(mixer) or next((s for s in range(100) if matrix.conditioned(mixer, s)), None)
    assert able is True, f"SEEDS[{mixer!r}] = {able} would do"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mixer", matrix.rows())
def test_every_cell_of_a_row_equals_one_process(mixer, run):
    measured = run_matrix(run, [cell for cell in matrix.cells() if cell.mixer == mixer], worlds=3, timeout=1800)
    parity_table.keep(mixer, measured)
    failed = red(measured)
    assert not failed, f"{len(failed)} of {len(measured)} cells\n" + "\n".join(failed[:50])
