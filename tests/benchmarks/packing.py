"""What each packing makes of documents of given lengths: the table of docs/data.md.

    python -m tests.benchmarks.packing LENGTHS.npy [8192]

Cut: documents that are in more than one sequence. Context: tokens that a token can see on average, itself half, which
is what causal softmax attention costs.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from data.samplers import PACKINGS
from data.samplers.documents import Documents
from data.samplers.pool import Cut, Pool


def rows(lengths: np.ndarray, longest: int, folder: Path) -> Iterator[str]:
    """A line of the table for each packing, and for concat without a document mask."""
    offsets = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
    hashes = np.full(len(lengths), 1 << 63, dtype=np.uint64)
    store: Any = SimpleNamespace(folder=folder / "store", fingerprint=str(folder), offsets=offsets, hashes=hashes)
    documents = Documents(store, side="train", heldout=0.01)
    cuts = {"concat": ("concat", "random"), "best_fit": ("best_fit", "random")}
    cuts |= {f"decomposition, {overlong}": ("decomposition", overlong) for overlong in ("random", "longest")}
    yield _row("concat, no document mask", documents, PACKINGS["concat"](documents, Cut(longest)), masked=False)
    for name, (packing, overlong) in cuts.items():
        yield _row(name, documents, PACKINGS[packing](documents, Cut(longest, overlong=overlong)), masked=True)


def _row(name: str, documents: Documents, pools: list[Pool], masked: bool) -> str:
    pieces = np.concatenate([pool.sequence((0, 0), i) for pool in pools for i in range(pool.count)])
    offsets, total = documents.store.offsets, len(documents)
    found = np.bincount(np.searchsorted(offsets, pieces[:, 0], side="right") - 1)
    sizes = (pieces[:, 1] - pieces[:, 0]).astype(float)
    held = sum(pool.count * pool.length for pool in pools)
    read = int(sizes.sum())
    context = (sizes**2).sum() / read / 2 if masked else pools[0].length / 2
    return (
        f"| {name} | {sum(pool.count for pool in pools):,} | {(found > 1).sum() / len(documents.ids):.1%} "
        f"| {1 - read / held:.3%} | {1 - read / total:.3%} | {context:,.0f} |"
    )


def main(path: str, longest: str = "8192") -> None:
    print("| packing | sequences | documents cut | padding | left out | mean context |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(np.load(path), int(longest), Path(folder)):
            print(row)


if __name__ == "__main__":
    main(*sys.argv[1:])
