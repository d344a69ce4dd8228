"""The progress display, from files written piece by piece as a run writes them."""

from __future__ import annotations

import io
import json
import re
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from launch.run.progress import ProgressBar
from launch.run.status import _steps
from train.settings import TrainSettings
from train.tracking import JsonlWriter, RunLog

TOTAL = 600_000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A run folder, the files that a run writes there, and a Progress that follows them."""

    def __init__(self, folder: Path, *, terminal: bool = False, width: int = 100, from_end: bool = False):
        self.clock = Clock()
        self.metrics = folder / "metrics.jsonl"
        self.log = folder / "log.txt"
        self._out = io.StringIO()
        console = Console(file=self._out, width=width, force_terminal=terminal, force_interactive=terminal)
        self.progress = ProgressBar(folder, TOTAL, console=console, interval=10, from_end=from_end, clock=self.clock)

    def write(self, text: str) -> None:
        with self.metrics.open("a") as file:
            file.write(text)

    def shown(self) -> str:
        """What was written since the last call."""
        text = self._out.getvalue()
        self._out.seek(0)
        self._out.truncate()
        return text

    def tick(self, seconds: float = 0) -> str:
        self.clock.now += seconds
        self.progress.tick()
        return self.shown()

    def close(self) -> str:
        self.progress.close()
        return self.shown()


def record(step: int, **more: Any) -> dict[str, Any]:
    """One step of 4096 tokens, a second each."""
    tokens = step * 4096
    return {"step": step, "tokens": tokens, "time": 1e9 + step, "loss": 3.0, "tokens_per_second": 5000.0} | more


def line(step: int, **more: Any) -> str:
    return json.dumps(record(step, **more)) + "\n"


def test_a_plain_line_says_it_all(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.write(line(1) + line(12, loss=3.0123, heldout_loss=2.9))
    assert run.tick().splitlines() == [
        "step 1  4,096 tokens (0%)  loss 3.000  5,000 tok/s  1:59 left",
        "step 12  49,152 tokens (8%)  loss 3.012  held-out 2.900  4,096 tok/s  2:14 left",
    ]


def test_a_held_out_loss_is_of_so_many_tokens(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.write(line(12, heldout_loss=2.9, heldout_accuracy=0.25, heldout_tokens=16384))
    assert "  held-out 2.900 (25.0% right) of 16,384 tokens  " in run.tick()


def test_a_mixture_says_the_loss_on_each_source(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    by_source = {"old": {"loss": 2.4, "accuracy": 0.3}, "new": {"loss": None, "accuracy": None}}
    run.write(line(12, heldout_loss=2.9, heldout=by_source))
    assert "  held-out 2.900  old 2.400, new not finite  " in run.tick()


def test_plain_lines_come_at_most_once_per_interval(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    assert run.tick() == ""  # no file yet
    shown = {}
    for step in range(1, 31):
        run.write(line(step))
        shown[step] = run.tick(seconds=1)
        assert run.tick() == ""
    assert [step for step, text in shown.items() if text] == [1, 11, 21]
    assert shown[11].startswith("step 11  45,056 tokens (7%)  loss 3.000  4,096 tok/s")


def test_held_out_results_and_the_last_step_are_always_shown(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.write(line(1) + line(2) + line(3, heldout_loss=2.9) + line(4) + line(5))
    assert re.findall(r"step (\d)", run.tick()) == ["1", "3"]
    assert re.findall(r"step (\d)", run.close()) == ["5"]
    assert run.close() == ""


def test_the_last_step_is_shown_once(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.write(line(1))
    assert run.tick() != ""
    assert run.close() == ""


def test_close_reads_what_no_tick_has_seen(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.write(line(1) + line(2))
    (tmp_path / "log.txt").write_text("saved step-2\n")
    assert [text.split("  ")[0] for text in run.close().splitlines()] == ["saved step-2", "step 1", "step 2"]


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    text = line(1)
    for piece in (text[:1], text[1:30], text[30:-1]):
        run.write(piece)
        assert run.tick() == ""
    assert run.progress.last is None
    run.write(text[-1])
    assert run.tick().startswith("step 1 ")
    assert run.progress.last == record(1)


def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.write('nonsense\n[1]\n3\n{"step": 1}\n' + line(2))
    assert run.tick().startswith("step 2 ")


def test_a_loss_that_is_not_finite_says_so(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    JsonlWriter(run.metrics).log(record(1, loss=float("nan"), heldout_loss=float("inf")))
    assert "  loss not finite  held-out not finite  " in run.tick()


def test_log_lines_are_shown_as_they_are(tmp_path: Path) -> None:
    run = Watched(tmp_path, width=40)
    notice = "[layers.0] :smile: [red]" + "long " * 20 + "end"
    RunLog(run.log)(notice)
    assert re.fullmatch(r"\S+ \S+  " + re.escape(notice) + "\n", run.tick())
    assert run.tick() == ""


def test_a_resumed_run_is_followed_from_the_end(tmp_path: Path) -> None:
    log, notices = JsonlWriter(tmp_path / "metrics.jsonl"), RunLog(tmp_path / "log.txt")
    for step in range(1, 11):
        log.log(record(step))
    notices("old")
    run = Watched(tmp_path, from_end=True)
    assert run.progress.last == record(10)
    assert run.tick() == ""
    notices("new")
    log.log(record(11))
    assert re.findall("old|new|step [0-9]+", run.tick()) == ["new", "step 11"]


def test_a_resumed_run_that_ends_at_once_shows_nothing_old(tmp_path: Path) -> None:
    JsonlWriter(tmp_path / "metrics.jsonl").log(record(1))
    assert Watched(tmp_path, from_end=True).close() == ""


def replaced(path: Path, step: int) -> JsonlWriter:
    """The file as another one that ends with `step`: restored from a copy, say."""
    aside = path.with_suffix(".aside")
    aside.write_text("".join(path.read_text().splitlines(keepends=True)[:step]))
    aside.replace(path)
    return JsonlWriter(path)


@pytest.mark.parametrize("from_end", [False, True])
def test_steps_trained_again_are_shown(tmp_path: Path, from_end: bool) -> None:
    """They are appended: the file has them twice, the second time with another attempt."""
    log = JsonlWriter(tmp_path / "metrics.jsonl")
    if from_end:
        for step in range(1, 11):
            log.log(record(step, attempt=1))
    run = Watched(tmp_path, from_end=from_end)
    if not from_end:
        for step in range(1, 11):
            log.log(record(step, attempt=1))
        run.tick()
    assert run.tick(seconds=10) == ""
    for step in range(7, 13):  # later in time, and every one shown
        log.log(record(step, attempt=2, time=1e9 + 100 + step, heldout_loss=2.0))
    shown = run.tick(seconds=10)
    assert re.findall(r"step (\d+)", shown) == ["7", "8", "9", "10", "11", "12"]
    assert re.findall(r"(\S+) tok/s", shown) == ["5,000"] + ["4,096"] * 5  # nothing of the time before
    assert run.progress.last == record(12, attempt=2, time=1e9 + 112, heldout_loss=2.0)


@pytest.mark.parametrize("from_end", [False, True])
@pytest.mark.parametrize("ticked", [False, True], ids=["longer again", "shorter"])
def test_a_replaced_file_shows_what_is_new_in_it(tmp_path: Path, from_end: bool, ticked: bool) -> None:
    log = JsonlWriter(tmp_path / "metrics.jsonl")
    if from_end:
        for step in range(1, 11):
            log.log(record(step))
    run = Watched(tmp_path, from_end=from_end)
    if not from_end:
        for step in range(1, 11):
            log.log(record(step))
        run.tick()
    log = replaced(run.metrics, 6)
    if ticked:
        assert run.tick(seconds=10) == ""
    for step in range(7, 13):
        log.log(record(step, time=1e9 + 100 + step, heldout_loss=2.0))
    assert re.findall(r"step (\d+)", run.tick(seconds=10)) == ["7", "8", "9", "10", "11", "12"]


def test_the_end_of_a_long_file_is_found(tmp_path: Path) -> None:
    log = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in range(1, 31):
        log.log(record(step, padding="x" * 100_000))
    run = Watched(tmp_path, from_end=True)
    assert run.progress.last is not None and run.progress.last["step"] == 30
    log = replaced(run.metrics, 28)
    log.log(record(29, time=2e9))
    assert re.findall(r"step (\d+)", run.tick()) == ["29"]


def test_the_speed_is_that_of_the_latest_steps_in_wall_time(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    for step in range(1, 41):
        run.write(line(step, time=1e9 + (100 * step if step < 8 else 800 + 2 * (step - 8))))  # slow, then 2 s a step
    run.tick()
    run.write(line(41, time=1e9 + 800 + 2 * 33))
    assert "  2,048 tok/s  3:31 left" in run.tick(seconds=10)


@pytest.mark.parametrize(
    ("seconds_a_step", "left"), [(0.1, "0:10"), (1, "1:41"), (60, "1:41:29"), (3600, "4d 05:29"), (36000, "42d 06:50")]
)
def test_time_left_reads_well(tmp_path: Path, seconds_a_step: float, left: str) -> None:
    run = Watched(tmp_path)
    run.write(line(44) + line(45, time=1e9 + 44 + seconds_a_step, heldout_loss=2.0))
    assert run.tick().splitlines()[-1].endswith(f"  {left} left")


def plain(text: str) -> list[str]:
    """What a terminal's lines end up with: escape codes removed, and the bar's drawing."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [re.sub("[━╸╺ ]+", " ", part).strip() for part in re.split("[\r\n]+", text) if part.strip()]


def test_a_terminal_shows_one_bar_and_the_notices_above_it(tmp_path: Path) -> None:
    run = Watched(tmp_path, terminal=True)
    assert plain(run.tick())[-1] == "starting"
    run.write(line(12, heldout_loss=2.9))
    run.write(line(13))
    assert plain(run.tick()) == ["8% step 13 loss 3.000 held-out 2.900 4,096 tok/s 2:13 left"]
    RunLog(run.log)("[step-13] saved")
    shown = run.tick()
    assert "━" in shown and "\x1b[2K" in shown  # the bar's line is cleared and drawn anew
    assert [text for text in plain(shown) if "saved" in text][0].endswith("[step-13] saved")
    assert plain(shown)[-1].startswith("8% step 13")
    run.write(line(147))
    assert plain(run.close())[-1].startswith("100% step 147")
    assert "saved" not in run.close()


def test_a_terminal_starts_where_the_resumed_run_stands(tmp_path: Path) -> None:
    log = JsonlWriter(tmp_path / "metrics.jsonl")
    log.log(record(73))
    drawn = Watched(tmp_path, terminal=True, width=30, from_end=True).tick().splitlines()[-1]
    done, rest = drawn.split("╺")
    assert done.count("━") > 8 and abs(done.count("━") - rest.count("━")) <= 2  # half way


def test_an_attempt_shows_nothing_of_the_one_before_and_says_which_steps_the_record_lacks(tmp_path, monkeypatch):
    from launch.run.failure import Outcome
    from launch.runner import attempts

    (tmp_path / "log.txt").write_text("old notice\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "time": 1.0, "loss": 3.0}\n{"step": 2, "tok')
    told = iter(["new notice\n", "newer notice\n"])

    def launch(flight, folder, code, hosted, progress, say, *, again):
        with (folder / "log.txt").open("a") as log:
            log.write(next(told))
        progress.tick()
        return Outcome(again, None if again else "a worker was lost", 0 if again else 1, lost=not again)

    monkeypatch.setattr(attempts, "_launch", launch)
    monkeypatch.setattr("train.checkpoints.checkpoint.manifest", lambda path: {"step": 4})
    settings = SimpleNamespace(restarts=1), SimpleNamespace(total_tokens=100)
    flight: Any = make_dataclass("Flight", ["cluster", "train", "resume"])(*settings, None)
    console = Console(file=io.StringIO(), width=200)
    assert attempts._attempts(flight, tmp_path, {}, None, console, console.print).ok
    said = console.file.getvalue()
    assert "old notice" not in said and said.count("new notice") == said.count("newer notice") == 1
    flight.resume = tmp_path / "checkpoints" / "step-4"
    attempts._say_missing(flight, tmp_path, console.print)
    assert "metrics.jsonl has no record of steps 2 to 4, which step-4 has been" in " ".join(
        console.file.getvalue().split()
    )


def test_the_steps_of_a_run_with_padding_are_those_that_its_budget_takes_at_this_rate():
    attempts = TrainSettings(tokens=3000, batch_tokens=384)
    assert attempts.total_steps == _steps(attempts, 0, 0) == _steps(attempts, 4, 4 * 384) == 8
    assert _steps(attempts, 4, 861) == 14 and not attempts.complete(8, 1700) and attempts.complete(15, 3100)
    by_steps = TrainSettings(steps=8, batch_tokens=384)
    assert _steps(by_steps, 4, 861) == 8 and by_steps.complete(8, 1700)
