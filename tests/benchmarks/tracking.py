"""What tracking costs the default job: W&B offline, TensorBoard, histograms and all.

    python -m tests.benchmarks.tracking [steps]

The line to read is the share of the training thread's CPU time that it spends in calls of the tracker: what training
waits for. The sinks work in threads of their own; what they cost the process, and W&B's service process, is told by
comparing runs with and without tracking, whose difference is within what two equal runs differ by.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config.compose import composed
from tests.world import run_world

FULL = ["tracking.mode=offline", "tracking.tensorboard=true"]


@dataclass(frozen=True)
class Cost:
    """CPU seconds of one `fit`: in calls of the tracker, of the training thread, of the process, of its children."""

    tracker: float
    thread: float
    process: float
    children: float
    calls: int


class Timed:
    """A tracker whose calls are timed by the calling thread's CPU clock."""

    def __init__(self, tracker: Any):
        self._tracker = tracker
        self.seconds, self.calls = 0.0, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._tracker, name)

        def timed(*given: Any, **more: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*given, **more)
            finally:
                self.seconds += time.thread_time() - began
                self.calls += 1

        return timed


def measure(order: dict[str, Any]) -> Cost:
    """Trains what is ordered, on this world."""
    from train.build import build
    from train.tracking.hook import Recording

    process, children = time.process_time(), _children()
    trainer = build(order)
    recording = trainer.hooks.of(Recording)
    timed: Any = Timed(recording.tracker)
    recording.tracker = timed
    thread = time.thread_time()
    trainer.fit()
    thread = time.thread_time() - thread
    return Cost(timed.seconds, thread, time.process_time() - process, _children() - children, timed.calls)


def fully_tracked(run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """What a launcher would order for one worker here, with all of tracking on."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = composed(["cluster=none", "cluster.workers=1", *overrides, *FULL])
    return {"config": config, "run_dir": str(run_dir), "device": "cpu"}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(steps: int = 12) -> None:
    size = [f"train.steps={steps}", "train.evaluate_every=24576", "train.checkpoint_every=24576"]
    with tempfile.TemporaryDirectory() as folder:
        on = fully_tracked(Path(folder) / "on", [*size, "data.heldout_tokens=16384"])
        off = fully_tracked(Path(folder) / "off", [*size, "data.heldout_tokens=16384"])
        off["config"]["tracking"] |= {"mode": "disabled", "tensorboard": False}
        costs = {name: run_world(1, measure, order, timeout=900)[0] for name, order in (("off", off), ("on", on))}
    for name, cost in costs.items():
        print(
            f"tracking {name}: {1000 * cost.tracker:.2f} ms of the training thread's {cost.thread:.2f} s in "
            f"{cost.calls} calls of the tracker; CPU of the process {cost.process:.2f} s, of its children "
            f"{cost.children:.2f} s"
        )
    print(f"share of the training thread's CPU time: {100 * costs['on'].tracker / costs['on'].thread:.3f}%")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
