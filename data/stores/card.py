"""A corpus card: what can be counted of a store without keeping the store in memory, and a picture of its lengths."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.stores.indexed import BLOCK

PERCENTILES = (1, 10, 50, 90, 99, 100)
HASHES = 1 << 22  # looked at for equals at a time: 32 MiB, and as much to sort them


def lengths_of(offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The lengths that documents have, ascending, and how many have each: of T tokens, at most sqrt(2 T) lengths."""
    lengths, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for begin in range(0, len(offsets) - 1, BLOCK):
        distinct, times = np.unique(np.diff(offsets[begin : begin + BLOCK + 1]), return_counts=True)
        lengths, places = np.unique(np.concatenate([lengths, distinct]), return_inverse=True)
        counts = np.bincount(places, np.concatenate([counts, times]), len(lengths)).astype(np.int64)
    return lengths, counts


def percentile(lengths: NDArray[np.int64], counts: NDArray[np.int64], p: float) -> int:
    """Computes np.percentile of all of them, rounded down: between the two nearest, linearly."""
    ends = np.cumsum(counts)
    rank = p / 100 * (ends[-1] - 1)
    low, high = (int(lengths[np.searchsorted(ends, place, side="right")]) for place in (int(rank), -int(-rank // 1)))
    return int(low + (high - low) * (rank - int(rank)))


def duplicates(hashes: NDArray[np.uint64]) -> int:
    """Counts the documents that have the content of an earlier one: exact, by 64 bits of sha256, in rounds of
    `HASHES`."""
    rounds = max(-(-len(hashes) // HASHES), 1)
    width = np.uint64(-(-(2**64) // rounds) if rounds > 1 else 2**64 - 1)
    repeated = 0
    for turn in range(rounds):
        chosen = [block[block // width == turn] if rounds > 1 else block for block in _blocks(hashes)]
        mine = np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.uint64)
        repeated += int(np.count_nonzero(mine[1:] == mine[:-1]))
    return repeated


def _blocks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for begin in range(0, len(values), BLOCK):
        yield np.asarray(values[begin : begin + BLOCK])


def histogram(lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> list[dict[str, int]]:
    """Documents and their tokens by length, in powers of two: `from` <= length < 2 `from`."""
    power = np.log2(np.maximum(lengths, 1)).astype(np.int64)
    power -= (1 << power) > np.maximum(lengths, 1)  # a logarithm may be rounded up
    return [
        {
            "from": 1 << int(p),
            "documents": int(counts[power == p].sum()),
            "tokens": int((counts * lengths)[power == p].sum()),
        }
        for p in np.unique(power)
    ]


def draw(bars: list[dict[str, int]], title: str, path: Path) -> None:
    """A PNG of a `histogram`: how many documents there are of each length, and where the tokens are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2))
    FigureCanvasAgg(figure)
    powers = np.array([bar["from"].bit_length() - 1 for bar in bars])
    axes = figure.add_axes((0.08, 0.17, 0.9, 0.73))
    for shift, key in ((-0.2, "documents"), (0.2, "tokens")):
        amounts = np.array([bar[key] for bar in bars], dtype=np.float64)
        axes.bar(powers + shift, 100 * amounts / amounts.sum(), 0.4, label=f"of the {key}")
    axes.set_xticks(powers, [_short(1 << int(p)) for p in powers])
    axes.set_xlabel("tokens in a document, from")
    axes.set_ylabel("%")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _short(number: int) -> str:
    for unit in ("", "K", "M", "G"):
        if number < 1024 or unit == "G":
            return f"{number}{unit}"
        number //= 1024
    raise AssertionError
