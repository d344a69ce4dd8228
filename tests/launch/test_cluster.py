"""Worlds on Ray: two starts for all that needs one, and one that is cut short."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from launch.cluster.controller import _judge, fit
from launch.cluster.driver import Report
from launch.run.failure import Failure, Outcome
from tests.launch.processes import all_gone, interrupt, launcher, listening, mentioning, pids, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def _nothing_left(run_dir: Path) -> None:
    """Every process that the launcher started inherited this from it."""
    wait_for(lambda: not mentioning(f"FARSPAN_TEST_LAUNCHER={run_dir}"), 10)


def _nobody_else_gets_in(mark: str) -> None:
    """All of a Ray of our own, and the rendezvous store, listens on loopback, and its folders are ours alone."""
    found = listening(mark)
    assert all(address.startswith("127.0.0.1:") for address in found), found
    for name in ("gcs_server", "raylet", "RayTrainWorker"):
        assert any(name in process for process in found.values()), (name, found)
    (gcs,) = {process for process in found.values() if "gcs_server" in process}
    place = Path(re.search(r"=(/[^=\0]*farspan-ray-\w+)/", gcs).group(1))  # type: ignore[union-attr]
    assert place.stat().st_mode & 0o077 == 0 and (place / "ray").exists()


@pytest.mark.slow
def test_ray_runs_quietly_and_stops_after_the_step(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()  # of an earlier attempt
    process = launcher("cluster.controller", "fit", "add_and_step", tmp_path)
    try:
        wait_for(lambda: len(list(tmp_path.glob("left-*"))) == 2, 180)
        if sys.platform == "linux":
            _nobody_else_gets_in(f"FARSPAN_TEST_LAUNCHER={tmp_path}")
        interrupt(process)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert output.splitlines() == ["stopping after this step (again: at once)", "outcome: True 0 None"]
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(2)] == ["3.0", "3.0"]
    assert (tmp_path / "threads-1").read_text() == f"1 1 gloo {os.nice(0)}"
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text()
    assert not (tmp_path / ".ray").exists() and not (tmp_path / "error.txt").exists()
    all_gone(pids(tmp_path))
    _nothing_left(tmp_path)


@pytest.mark.slow
def test_ray_names_a_killed_rank(tmp_path: Path) -> None:
    process = launcher("cluster.controller", "fit", "die", tmp_path)
    try:
        wait_for(lambda: len(pids(tmp_path)) == 2, 180)
        killed = time.monotonic()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert output.splitlines() == ["outcome: False 1 rank 1 was killed (SIGKILL, or a crash)"]
    assert time.monotonic() - killed < 20
    assert "rank 0: RuntimeError" in (tmp_path / "error.txt").read_text()  # what the peer saw is kept, after it
    all_gone(pids(tmp_path))
    _nothing_left(tmp_path)


def test_a_second_signal_while_ray_starts_ends_it_at_once(tmp_path: Path) -> None:
    process = launcher("cluster.controller", "fit", "stuck", tmp_path)
    try:
        wait_for(lambda: "gcs_server" in " ".join(mentioning(f"FARSPAN_TEST_LAUNCHER={tmp_path}")), 60)
        interrupt(process, signal.SIGTERM)
        time.sleep(0.5)
        interrupt(process, signal.SIGTERM)
        output, _ = process.communicate(timeout=15)
    finally:
        process.kill()
    lines = output.splitlines()
    assert lines[0].startswith("stopping after this step") and lines[1].startswith("outcome: False 1 stopped at once: ")
    assert len(lines) == 2
    _nothing_left(tmp_path)


def test_reports_become_outcomes(tmp_path: Path) -> None:
    bug = Failure(1, 1.0, "ValueError: banana", "Traceback ...\nValueError: banana\n")
    mistake = Failure(0, 1.0, "UserError: x", "Traceback ...", "train.tokens: got -1")

    class Process:
        exitcode = -9

        def join(self, timeout: float) -> None:
            pass

    def judge(report: Report | None) -> Outcome:
        return _judge(report, Process(), tmp_path)  # type: ignore[arg-type]

    error = tmp_path / "error.txt"
    assert judge(Report(True)) == Outcome(True, None, 0)
    assert judge(Report(False, [bug])).reason == f"rank 1: ValueError: banana (full trace: {error})"
    assert judge(Report(False, [mistake])) == Outcome(False, "train.tokens: got -1", 2)
    no_ray = judge(Report(False, line="TimeoutError: no raylet", trace="a trace"))
    assert no_ray == Outcome(False, f"Ray: TimeoutError: no raylet (full trace: {error})", 1, lost=True)
    assert error.read_text() == "a trace"
    assert "exit code -9" in str(judge(None).reason)


def test_unusable_arguments_are_refused_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 'module:function'"):
        fit("no_colon", {}, workers=1, run_dir=tmp_path, device="cpu", threads=1, tick=lambda: None)


def test_each_ray_of_ours_has_a_secret_of_its_own(tmp_path):
    """Whoever is on this machine may reach its ports: without its token nobody may hand it work."""
    from launch.cluster.driver import _RAY_ENVIRONMENT, _token

    (one, two) = (tmp_path / name for name in ("one", "two"))
    secrets = set()
    for place in (one, two):
        place.mkdir()
        path = Path(_token(str(place))["RAY_AUTH_TOKEN_PATH"])
        assert path.parent == place and path.stat().st_mode & 0o077 == 0
        secrets.add(path.read_text())
    assert len(secrets) == 2 and all(len(secret) == 64 for secret in secrets)
    assert _RAY_ENVIRONMENT["RAY_AUTH_MODE"] == "token"
