"""Spawned worlds: how they end, whom they blame, how they stop, and that nothing is left of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.run.failure import Failure, Outcome, verdict
from launch.world.spawn import spawn
from tests.launch.processes import all_gone, interrupt, launcher, listening, mentioning, pids, wait_for

pytestmark = [pytest.mark.dist, pytest.mark.timeout(150)]


def _spawn(entry: str, run_dir: Path, workers: int = 2, **more: object) -> Outcome:
    arguments: dict = {"device": "cpu", "threads": 1, "tick": lambda: None, **more}
    return spawn(f"tests.launch.entries:{entry}", {"dir": str(run_dir)}, workers=workers, run_dir=run_dir, **arguments)


def test_a_world_meets_computes_and_leaves(tmp_path: Path) -> None:
    before = dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ticks: list[float] = []
    (tmp_path / "stop").touch()  # of an earlier attempt
    assert _spawn("add", tmp_path, workers=3, tick=lambda: ticks.append(0)) == Outcome(True, None, 0)
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(3)] == ["6.0"] * 3
    assert (tmp_path / "threads-1").read_text() == f"1 1 gloo {os.nice(0)}"
    assert ticks and not (tmp_path / "stop").exists() and not (tmp_path / "error.txt").exists()
    all_gone(pids(tmp_path))
    assert dict(os.environ) == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not multiprocessing.active_children()


def test_a_second_world_starts_in_a_moment(tmp_path: Path) -> None:
    assert _spawn("add", tmp_path).ok
    began = time.monotonic()
    assert _spawn("add", tmp_path).ok
    assert (
        time.monotonic() - began < 10
    )  # 0.1 s on a quiet machine; a fresh import of torch for each would take 10 to 20 s


def test_workers_see_the_callers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARSPAN_TEST_NOTE", "as it is now")
    monkeypatch.chdir(tmp_path)
    assert _spawn("surroundings", tmp_path).ok
    assert (tmp_path / "environ-0").read_text() == "as it is now"
    assert (tmp_path / "directory-1").read_text() == str(tmp_path)


def test_the_rank_that_raised_is_blamed(tmp_path: Path) -> None:
    began = time.monotonic()
    outcome = _spawn("fail", tmp_path)
    error = tmp_path / "error.txt"
    assert outcome == Outcome(False, f"rank 1: ValueError: the loss is a banana (full trace: {error})", 1)
    assert error.read_text().startswith("rank 1: ValueError") and "with a second line" in error.read_text()
    assert time.monotonic() - began < 20


def test_a_users_mistake_is_its_own_line(tmp_path: Path) -> None:
    assert _spawn("mistake", tmp_path) == Outcome(False, "train.tokens: got -1, needs at least 1", 2)


def test_an_entry_that_does_not_exist_is_a_failure(tmp_path: Path) -> None:
    outcome = _spawn("no_such_function", tmp_path)
    assert outcome.exit_code == 1 and outcome.reason is not None and "no_such_function" in outcome.reason


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    began = time.monotonic()
    assert _spawn("die", tmp_path) == Outcome(False, "rank 1 was killed (SIGKILL)", 1, lost=True)
    assert time.monotonic() - began < 20
    all_gone(pids(tmp_path))
    assert not multiprocessing.active_children()


def test_a_rank_that_leaves_without_a_word_is_named(tmp_path: Path) -> None:
    assert _spawn("leave", tmp_path) == Outcome(False, "rank 1 left with exit code 3", 1, lost=True)


def test_a_world_that_does_not_start_in_time_is_ended(tmp_path: Path) -> None:
    reason = _spawn("slow_to_import", tmp_path, start_timeout=1).reason
    assert reason == "ranks 0, 1 did not start within 1 s"
    assert not multiprocessing.active_children()


def test_unusable_arguments_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers: got 0"):
        _spawn("add", tmp_path, workers=0)
    with pytest.raises(ValueError, match="device: got 'tpu'"):
        _spawn("add", tmp_path, device="tpu")


def test_a_failing_tick_leaves_no_worker(tmp_path: Path) -> None:
    def tick() -> None:
        if len(pids(tmp_path)) == 2:
            raise RuntimeError("the display broke")

    with pytest.raises(RuntimeError, match="display"):
        _spawn("stuck", tmp_path, tick=tick)
    all_gone(pids(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(tmp_path: Path, number: int) -> None:
    process = launcher("world.spawn", "spawn", "steps", tmp_path)
    try:
        wait_for(lambda: len(pids(tmp_path)) == 2, 60)
        if sys.platform == "linux":
            found = listening(f"FARSPAN_TEST_LAUNCHER={tmp_path}")
            assert found and all(address.startswith("127.0.0.1:") for address in found), found
        interrupt(process, number)  # to the whole group: workers and fork server too
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert output.splitlines() == ["stopping after this step (again: at once)", "outcome: True 0 None"]
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text()
    all_gone(pids(tmp_path))
    wait_for(lambda: not mentioning(f"FARSPAN_TEST_LAUNCHER={tmp_path}"), 10)  # the fork server and the tracker too


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    process = launcher("world.spawn", "spawn", "stuck", tmp_path)
    try:
        wait_for(lambda: len(pids(tmp_path)) == 2, 60)
        interrupt(process)
        time.sleep(0.5)
        interrupt(process)
        output, _ = process.communicate(timeout=10)
    finally:
        process.kill()
    assert output.splitlines()[1].startswith("outcome: False 1 stopped at once: ")
    all_gone(pids(tmp_path))


def test_workers_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    process = launcher("world.spawn", "spawn", "steps", tmp_path)
    try:
        wait_for(lambda: len(pids(tmp_path)) == 2, 60)
    finally:
        process.kill()
        process.wait(10)
    all_gone(pids(tmp_path), 20)
    assert (tmp_path / "stopped-0").exists()  # and they saved, as on a signal


def test_off_the_main_thread_it_works_without_handlers(tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(_spawn("add", tmp_path)))
    thread.start()
    thread.join(60)
    assert outcomes == [Outcome(True, None, 0)]


def test_blame(tmp_path: Path) -> None:
    def failure(rank: int, when: float, trace: str, user_line: str | None = None) -> Failure:
        return Failure(rank, when, trace, trace, user_line)

    reset = "RuntimeError: [/pytorch/third_party/gloo/...] Connection closed by peer [127.0.0.1]:31337"
    bug, also = failure(2, 1.5, "KeyError: 'x'"), failure(1, 1.6, "KeyError: 'x'")
    peer = failure(0, 1.0, reset)

    def reason(failures: list[Failure], deaths: list[tuple[int, str]]) -> str:
        return str(verdict(failures, deaths, tmp_path).reason)

    assert reason([peer, also, bug], []).startswith("rank 2: KeyError")  # not the peer, then the earliest
    assert reason([peer, failure(3, 2.0, reset)], []).startswith("rank 0:")  # only peers: the earliest
    assert reason([bug, peer], [(3, "was killed (SIGKILL)")]) == "rank 3 was killed (SIGKILL)"
    aborted = [(3, "was killed (SIGABRT)")]  # NCCL's watchdog, when a peer is gone
    assert reason([bug], aborted).startswith("rank 2: KeyError")
    assert reason([peer], aborted) == "rank 3 was killed (SIGABRT)"
    assert verdict([peer, failure(1, 3.0, reset, "no such corpus")], [], tmp_path).exit_code == 2
    assert reason([], []) == "the workers ended without a report"
