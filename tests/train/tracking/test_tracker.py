"""The queue between training and a sink: bounded, never waiting, counting what it dropped."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.tracking.common import read, record, until
from train.tracking import JsonlWriter, Tracker


class Listener:
    """A sink that remembers, and waits where it is told to until `gate` opens."""

    name = "Listener"
    patience = 0.2

    def __init__(self, waits_in: str = "", fails_in: str = "") -> None:
        self.gate = threading.Event()
        self.inside = threading.Event()
        self.heard: list[tuple[str, Any]] = []
        self._waits_in, self._fails_in = waits_in, fails_in

    def _hear(self, what: str, given: Any) -> None:
        if what == self._waits_in:
            self.inside.set()
            self.gate.wait()
        self.heard.append((what, given))
        if what == self._fails_in:
            raise RuntimeError(f"no {what} today\nand more")

    def start(self) -> None:
        self._hear("start", None)

    def log(self, record: dict[str, Any], line: int) -> None:
        self._hear("log", (record["step"], line, record.get("tracking")))

    def checkpoint(self, path: Path, facts: dict[str, Any]) -> None:
        self._hear("checkpoint", (path, facts))

    def alert(self, title: str, text: str, level: str) -> None:
        self._hear("alert", (title, text, level))

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        self._hear("finish", (summary, exit_code))

    def steps(self) -> list[int]:
        return [given[0] for what, given in self.heard if what == "log"]


@pytest.fixture
def said() -> list[str]:
    return []


def tracker(path: Path, said: list[str], *sinks: Any, **options: Any) -> Tracker:
    return Tracker(JsonlWriter(path / "metrics.jsonl"), sinks, say=said.append, **options)


def test_a_sink_that_blocks_forever_costs_nothing_and_is_given_up(tmp_path: Path, said: list[str]) -> None:
    sink = Listener(waits_in="log")
    tracked = tracker(tmp_path, said, sink, queue=4, timeout=0.2)
    tracked.log(record(1))
    sink.inside.wait(5)
    start, own = time.monotonic(), time.thread_time()
    for step in range(2, 502):
        tracked.log(record(step))
    assert time.thread_time() - own < 0.5 and time.monotonic() - start < 5  # 1 ms each, where 0.05 is usual
    assert said == ["Listener is slow, its queue of 4 is full: until it keeps up, records go to metrics.jsonl only"]
    start = time.monotonic()
    tracked.finish({})
    assert time.monotonic() - start < 2
    assert said[1:] == [
        "Listener was slow: 496 records were dropped for it; metrics.jsonl has them all",
        "Listener is given up after 0.2 s: 5 records were left for it; metrics.jsonl has them all",
    ]
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == list(range(1, 502))
    sink.gate.set()


def test_what_was_dropped_is_counted_in_the_next_record_and_in_the_summary(tmp_path: Path, said: list[str]) -> None:
    sink = Listener(waits_in="log")
    tracked = tracker(tmp_path, said, sink, queue=2)
    tracked.log(record(1))
    sink.inside.wait(5)
    for step in range(2, 7):  # 2 and 3 wait in the queue, 4 to 6 are dropped
        tracked.log(record(step))
    sink.gate.set()
    until(lambda: sink.steps() == [1, 2, 3])
    for step in (7, 8):
        tracked.log(record(step))
        until(lambda step=step: sink.steps()[-1] == step)
    tracked.finish({"loss": 0.5})
    assert [given for what, given in sink.heard if what == "log"][-2:] == [(7, 6, {"dropped": 3}), (8, 7, None)]
    assert sink.heard[-1] == ("finish", ({"loss": 0.5, "tracking/dropped": 3}, 0))
    assert said[1:] == ["Listener was slow: 3 records were dropped for it; metrics.jsonl has them all"]
    assert "tracking" not in read(tmp_path / "metrics.jsonl")[6]


def test_the_queue_is_drained_at_the_end_in_order(tmp_path: Path, said: list[str]) -> None:
    sink = Listener(waits_in="start")
    tracked = tracker(tmp_path, said, sink)
    for step in range(1, 201):  # training does not wait for a sink to start
        tracked.log(record(step))
    tracked.checkpoint(tmp_path, {"step": 200})
    tracked.alert("title", "text")
    threading.Timer(0.05, sink.gate.set).start()
    tracked.finish({"loss": 0.5}, exit_code=3)
    assert sink.heard[0] == ("start", None) and sink.steps() == list(range(1, 201))
    assert [given[1] for what, given in sink.heard if what == "log"] == list(range(200))  # lines of metrics.jsonl
    assert sink.heard[-3:] == [
        ("checkpoint", (tmp_path, {"step": 200})),
        ("alert", ("title", "text", "INFO")),
        ("finish", ({"loss": 0.5, "tracking/dropped": 0}, 3)),
    ]
    assert said == []


def test_lines_are_counted_on_over_restarts(tmp_path: Path, said: list[str]) -> None:
    for attempt in (1, 2):
        sink = Listener()
        tracked = tracker(tmp_path, said, sink)
        for step in (1, 2, 3):
            tracked.log(record(step, attempt))
        tracked.finish({})
        assert [given[1] for what, given in sink.heard if what == "log"] == [3 * attempt - 3 + i for i in range(3)]


@pytest.mark.parametrize("what", ["log", "checkpoint", "alert"])
def test_a_sink_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path, said: list[str], what: str) -> None:
    broken, whole = Listener(fails_in=what), Listener()
    tracked = tracker(tmp_path, said, broken, whole)
    tracked.checkpoint(tmp_path, {})
    tracked.alert("title", "text")
    for step in (1, 2, 3):
        tracked.log(record(step))
    tracked.finish({})
    assert said == [f"Listener stopped taking metrics, metrics.jsonl goes on: no {what} today"]
    assert whole.steps() == [1, 2, 3]
    assert broken.heard[-1][0] == "finish" and broken.heard[-2][0] == what  # ended as well as it can be


def test_a_sink_that_does_not_start_is_left_out(tmp_path: Path, said: list[str]) -> None:
    sink = Listener(fails_in="start")
    tracked = tracker(tmp_path, said, sink)
    tracked.log(record(1))
    tracked.finish({})
    assert said == ["Listener is off for this run: no start today"]
    assert [what for what, _ in sink.heard] == ["start"]


def test_a_sink_that_never_starts_is_given_up(tmp_path: Path, said: list[str]) -> None:
    sink = Listener(waits_in="start")
    tracked = tracker(tmp_path, said, sink, timeout=0.1)
    tracked.log(record(1))
    start = time.monotonic()
    tracked.finish({})
    assert time.monotonic() - start < 2
    assert said == ["Listener is given up after 0.1 s: 1 records were left for it; metrics.jsonl has them all"]
    sink.gate.set()


def test_the_end_is_told_once(tmp_path: Path, said: list[str]) -> None:
    sink = Listener()
    tracked = tracker(tmp_path, said, sink)
    tracked.finish({"loss": 1.0})
    tracked.finish({"error": "late"}, exit_code=1)
    assert [given for what, given in sink.heard if what == "finish"] == [({"loss": 1.0, "tracking/dropped": 0}, 0)]
