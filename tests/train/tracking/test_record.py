"""The record on disk, byte by byte, and how it is read when steps were trained again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.tracking.common import read, record
from train.tracking import JsonlWriter, RunLog, newest_attempt, records


def test_a_reader_sees_whole_lines_at_once(tmp_path: Path) -> None:
    log = JsonlWriter(tmp_path / "run" / "metrics.jsonl")
    for step in (1, 2):
        assert log.log(record(step)) == record(step)
        assert read(tmp_path / "run" / "metrics.jsonl") == [record(s) for s in range(1, step + 1)]
        assert log.lines == step


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    log = JsonlWriter(tmp_path / "m.jsonl")
    log.log({"loss": math.nan, "grad_norm": -math.inf, "expert_load": {"layers.0": [0.5, math.nan]}, "lr": 0.1})
    log.log({"loss": 1.0})
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "m.jsonl").open())
    assert first == {
        "loss": None,
        "grad_norm": None,
        "expert_load": {"layers.0": [0.5, None]},
        "lr": 0.1,
        "nonfinite": ["loss", "grad_norm", "expert_load/layers.0/1"],
    }
    assert second == {"loss": 1.0}


def test_tensors_and_arrays_are_numbers(tmp_path: Path) -> None:
    log = JsonlWriter(tmp_path / "m.jsonl")
    log.log({"loss": torch.tensor(0.5), "load": torch.tensor([1, 2]), "n": np.int64(3), "x": np.float32("inf")})
    assert read(tmp_path / "m.jsonl") == [{"loss": 0.5, "load": [1, 2], "n": 3, "x": None, "nonfinite": ["x"]}]


@pytest.mark.parametrize("cut", [b"{", b'{"step": 3, "loss": 1.0}', b"\0" * 5000, b"x" * 100_000, b"x" * (3 << 20)])
def test_a_cut_last_line_is_removed(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + cut)
    assert [r["step"] for r in records(path)] == [1, 2]
    log = JsonlWriter(path)
    assert log.lines == 2
    log.log({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_file_of_one_cut_line_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step"')
    JsonlWriter(path).log({"step": 1})
    assert path.read_bytes() == b'{"step": 1}\n'


def written(path: Path, *attempts: tuple[int, list[int]]) -> list[tuple[int, int]]:
    """Write (attempt, its steps) in turn, and read (step, attempt) of what counts."""
    log = JsonlWriter(path)
    for attempt, steps in attempts:
        for step in steps:
            log.log({"step": step, "attempt": attempt})
    log.close()
    return [(r["step"], r["attempt"]) for r in records(path)]


@pytest.mark.parametrize(
    ("attempts", "counts"),
    [
        ([(1, [1, 2, 3])], [(1, 1), (2, 1), (3, 1)]),
        ([(1, [1, 2, 3, 4]), (2, [3, 4, 5])], [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]),
        # the second attempt stopped early: what the first did beyond is superseded all the same
        ([(1, [1, 2, 3, 4, 5, 6]), (2, [3, 4])], [(1, 1), (2, 1), (3, 2), (4, 2)]),
        ([(1, [1, 2, 3, 4]), (2, [3, 4]), (3, [2])], [(1, 1), (2, 3)]),
        ([(1, [1, 2, 3]), (2, [1])], [(1, 2)]),
        ([(1, [1, 2]), (3, [3])], [(1, 1), (2, 1), (3, 3)]),
        # a worker of the first attempt, thought to be lost, writes on
        ([(1, [1, 2, 3]), (2, [2]), (1, [4, 5]), (2, [3])], [(1, 1), (2, 2), (3, 2)]),
    ],
)
def test_the_newest_attempt_counts(tmp_path: Path, attempts: Any, counts: Any) -> None:
    path = tmp_path / "m.jsonl"
    assert written(path, *attempts) == counts
    everything = [(step, attempt) for attempt, steps in attempts for step in steps]
    assert [(r["step"], r["attempt"]) for r in records(path, every_attempt=True)] == everything
    assert newest_attempt(path) == max(attempt for attempt, _ in attempts)


def test_what_is_no_steps_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"event": "start"}\n{"step": 1}\n\0\0\n[]\n{"step": 2}\n')
    assert records(path) == records(path, every_attempt=True) == [{"step": 1}, {"step": 2}]
    assert newest_attempt(path) == 1
    assert records(tmp_path / "none") == [] and newest_attempt(tmp_path / "none") == 0


def test_the_newest_attempt_of_a_long_file_is_found_at_its_end(tmp_path: Path) -> None:
    log = JsonlWriter(tmp_path / "m.jsonl")
    for step in range(30):
        log.log({"step": step, "attempt": 1 + step // 10, "padding": "x" * 100_000})
    assert newest_attempt(tmp_path / "m.jsonl") == 3


def test_run_log_appends_lines_with_the_time(tmp_path: Path) -> None:
    for line in ("first", "Größe 2"):
        log = RunLog(tmp_path / "run" / "log.txt")
        log(line)  # read before it is closed: flushed
        last = (tmp_path / "run" / "log.txt").read_text("utf-8").splitlines()[-1]
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d  {line}", last)
        log.close()
    assert len((tmp_path / "run" / "log.txt").read_text("utf-8").splitlines()) == 2


def test_a_notice_that_a_full_disk_has_no_room_for_is_said_all_the_same(capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    log = RunLog("/dev/full")
    log("the disk is full")
    log("and still is")
    log.close()
    assert capsys.readouterr().err == "the disk is full\nand still is\n"
