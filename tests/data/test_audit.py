from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.audit import audit
from data.curriculum import Curriculum
from data.samplers.pool import Pool
from tests.data.fake import batches

LENGTHS = [1 + 37 * i % 301 for i in range(60)]


@pytest.mark.parametrize("packing", ["concat", "best_fit", "decomposition"])
def test_whole_epochs_lose_nothing(tmp_path: Path, packing: str) -> None:
    one = batches(tmp_path, LENGTHS, 128, packing=packing, curriculum=None)
    lines = audit(one, 3, 200)
    assert lines[0] == "200 steps of 128 tokens: no token lost, none seen twice in an epoch"
    ended = {part.name: one.drawn(200)[part.name] // (part.pool.count * part.pool.length) for part in parts(one)}
    assert f"{sum(ended.values())} epochs of a pool ended" in lines[1] and sum(ended.values()) > 1
    audit(one, 3, 20, first=77, skips=4)


def test_a_curriculum_loses_nothing(tmp_path: Path) -> None:
    curriculum = Curriculum(odds="grow_p100", cycles=2, tokens=128 * 40)
    audit(batches(tmp_path, LENGTHS, 128, packing="decomposition", curriculum=curriculum), 0, 100)


def parts(one: Any) -> list[Any]:
    return [part for _, sampler, _ in one.stages for lane in sampler.lanes for part in lane.parts]


def without_its_last(pieces: np.ndarray) -> np.ndarray:
    longest = (pieces[:, 1] - pieces[:, 0]).argmax()
    pieces[longest, 1] -= 1
    return pieces


BREAKS: dict[str, Any] = {
    "a token is seen twice": lambda pieces, key, index: pieces(key, index // 2 * 2),
    "tokens are lost": lambda pieces, key, index: without_its_last(pieces(key, index)),
    "does not read what the store holds": None,
    "left out or come twice": None,
}


@pytest.mark.parametrize("line", sorted(BREAKS))
def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    one = batches(tmp_path, LENGTHS, 128)
    pieces = Pool.pieces
    if BREAKS[line] is not None:
        monkeypatch.setattr(Pool, "pieces", lambda self, key, i: BREAKS[line](lambda *a: pieces(self, *a), key, i))
    elif "read" in line:
        batch = one.batch

        def changed(*asked: int) -> list[Any]:
            found = batch(*asked)
            found[0].tokens[5] += 1
            return found

        monkeypatch.setattr(one, "batch", changed)
    else:
        slots = one.slots
        monkeypatch.setattr(one, "slots", lambda step, skips=0: slots(step + (step > 3), skips))
    with pytest.raises(AssertionError, match=line):
        audit(one, 0, 150)


def test_an_audit_reads_the_right_steps(tmp_path: Path) -> None:
    one = batches(tmp_path, LENGTHS, 128)
    seen: list[int] = []
    batch = one.batch
    one.batch = lambda seed, step, skips=0: seen.append(step + skips) or batch(seed, step, skips)  # type: ignore
    audit(one, 0, 5, first=10, skips=2)
    assert seen == [12, 13, 14, 15, 16]
    assert np.array_equal(one.batch(0, 3)[0].tokens, batch(0, 3)[0].tokens)
