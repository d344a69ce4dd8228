import threading
from pathlib import Path

import numpy as np
import pytest

from data.prefetch import Prefetched
from tests.data.fake import batches


class Counting:
    """Batches that say which were made, and on which thread."""

    fingerprint = "x"

    def __init__(self) -> None:
        self.made: list[tuple[int, str]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def batch(self, seed: int, step: int, skips: int = 0) -> tuple[int, int, int]:
        self.go_on.wait(10)
        self.made.append((step, threading.current_thread().name.split("_")[0]))
        if step >= 100:
            raise ValueError("used up")
        return seed, step, skips


def test_the_next_batch_is_made_on_another_thread() -> None:
    inner = Counting()
    ahead = Prefetched(inner)
    assert [ahead.batch(7, step) for step in range(5)] == [(7, step, 0) for step in range(5)]
    ahead.batch(7, 4)  # as an evaluation does: the next one stays
    assert ahead.batch(7, 5) == (7, 5, 0)
    ahead._thread.shutdown(wait=True)
    main = threading.current_thread().name.split("_")[0]
    assert [step for step, thread in inner.made if thread == main] == [0, 4]
    assert sorted(step for step, thread in inner.made if thread == "batches") == [1, 2, 3, 4, 5, 6]
    assert ahead.fingerprint == "x"


def test_a_step_does_not_wait_for_the_one_after() -> None:
    inner = Counting()
    ahead = Prefetched(inner)
    ahead.batch(0, 0)
    ahead._next[1].result()  # type: ignore[index]
    inner.go_on.clear()
    assert ahead.batch(0, 1) == (0, 1, 0)
    inner.go_on.set()


def test_another_step_or_another_skip_is_made_where_it_is_asked_for() -> None:
    ahead = Prefetched(Counting())
    assert ahead.batch(0, 3) == (0, 3, 0)
    assert ahead.batch(0, 4, 2) == (0, 4, 2)
    assert ahead.batch(1, 5, 2) == (1, 5, 2)
    assert ahead.batch(0, 9) == (0, 9, 0)


def test_what_goes_wrong_is_raised_where_it_is_asked_for() -> None:
    ahead = Prefetched(Counting())
    assert ahead.batch(0, 99) == (0, 99, 0)  # the one after cannot be made, and nobody asks
    with pytest.raises(ValueError, match="used up"):
        ahead.batch(0, 100)


def test_it_is_the_batch(tmp_path: Path) -> None:
    one = batches(tmp_path, [1 + 37 * i % 301 for i in range(60)], 128, packing="decomposition")
    ahead = Prefetched(one)
    for step in range(20):
        pairs = zip(ahead.batch(0, step), one.batch(0, step), strict=True)
        assert all(np.array_equal(a.tokens, b.tokens) for a, b in pairs)
