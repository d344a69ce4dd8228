"""The hook that writes a run's records, its summary and its alerts, on rank 0. Nothing sees a record before
metrics.jsonl has it but the hooks that stand before this one, which add to it."""

import json
import time
from pathlib import Path
from typing import Any

from train.hooks import Hook, Record
from train.metrics.timing import PhaseTimes
from train.state import TrainProgress
from train.tracking.tracker import Tracker

ABOUT = ("heldout", "forgetting", "adaptation")  # how keys begin that a summary takes from the last record
SCORES = ("heldout_loss", "heldout_accuracy", "heldout_tokens", "heldout")  # that it takes from the last evaluation


class Recording(Hook):
    """Hands records on to a tracker; silent on the ranks that have none."""

    def __init__(self, run_dir: Path, progress: TrainProgress, phases: PhaseTimes):
        self.tracker: Tracker | None = None
        self._run_dir, self._progress, self._phases = run_dir, progress, phases
        self._began = time.time()
        self._last: Record = {}
        self._scores: Record = {}

    def before_run(self) -> None:
        self._began = time.time()
        if (attempt := self._progress.state.attempt) > 1:
            self.alert("goes on", f"attempt {attempt} goes on from step {self._progress.state.step}", "INFO")

    def after_step(self, record: Record) -> None:
        if "heldout_loss" in record:
            self._scores = {key: record[key] for key in SCORES if key in record}
        self._write(record)

    def on_skip(self, record: Record) -> None:
        self._write(record)

    def after_run(self) -> None:
        """Writes summary.json, and ends the tracker."""
        if self.tracker is None:
            return
        last, state = self._last, self._progress.state
        summary: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "loss": last.get("loss")}
        summary |= {"heldout_loss": None, "heldout_accuracy": None} | self._scores
        summary |= {key: value for key, value in last.items() if key.startswith(ABOUT) and key not in summary}
        summary |= {"seconds": time.time() - self._began, "stopped": self._progress.stopping}
        aside = self._run_dir / "summary.json.partial"
        aside.write_text(json.dumps(summary))
        aside.replace(self._run_dir / "summary.json")
        self.tracker.finish(summary)

    def on_failure(self, error: BaseException) -> None:
        """Tells the tracker what ended the run."""
        if self.tracker is None:
            return
        state, line = self._progress.state, (str(error).splitlines() or [""])[0]
        title = "not finite" if isinstance(error, FloatingPointError) else "failed"
        text = f"{type(error).__name__}: {line} (attempt {state.attempt}, step {state.step})"
        self.alert(title, text, "ERROR")
        self.tracker.finish({"step": state.step, "tokens": state.tokens, "error": text}, exit_code=1)

    def log(self, record: Record) -> None:
        """Writes a record that is no step's own, or a step's."""
        with self._phases("logging"):
            if self.tracker is not None:
                self.tracker.log({**record, "seconds": self._phases.take()})

    def checkpoint(self, path: Path, record: Record) -> None:
        """Tells of a checkpoint of the step with this record."""
        if self.tracker is not None:
            self.tracker.checkpoint(path, {key: record[key] for key in ("step", "tokens", "loss")})

    def alert(self, title: str, text: str, level: str) -> None:
        """Tells a person who does not watch."""
        if self.tracker is not None:
            self.tracker.alert(title, text, level)

    def _write(self, record: Record) -> None:
        self._last = record
        self.log(record)
