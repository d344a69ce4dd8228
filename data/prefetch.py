"""The next batch, made on another thread while the step runs."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

BatchKey = tuple[int, int, int]  # seed, step, skips


class Prefetched:
    """Batches, and the one that follows the last asked for: a batch is a function of its step, so this is a guess.

    A wrong one costs nothing but its making. What making a batch raises is raised where it is asked for.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[BatchKey, Future[Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def following(self) -> Future[Any] | None:
        """The batch behind the last one that was asked for, while it is made and after; None before any was."""
        return None if self._next is None else self._next[1]

    def batch(self, seed: int, step: int, skips: int = 0) -> Any:
        """The global batch of a step, `skips` batches having been skipped before it."""
        key, following = (seed, step, skips), (seed, step + 1, skips)
        made = self._next
        if made is None or made[0] != following:  # a step asked for again leaves the next one as it is
            self._next = following, self._thread.submit(self._batches.batch, *following)
        return made[1].result() if made is not None and made[0] == key else self._batches.batch(*key)
