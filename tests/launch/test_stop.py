"""Ctrl-C, SIGTERM and `farspan stop` at random moments of a run, also inside a checkpoint and inside start-up.

Always: exit code 0, a run folder that goes on to the uninterrupted run's numbers (or none), nothing left running.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.run.signals import SignalCount, SignalLatch, Stopping
from launch.terminal import Lasting
from tests import warm
from tests.jobs import overrides
from tests.launch.processes import mentioning, wait_for
from train.checkpoints import checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
STEPS = 16
MARK = "FARSPAN_TEST_STOP"


def start(place: Path, *words: str, cold: bool = True) -> subprocess.Popen:
    """A `farspan`, in a fresh interpreter that starts as a user's does; warm where nothing of it is looked at."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(place)}
    return subprocess.Popen(
        [*(warm.COLD if cold else warm.command()), *words],
        cwd=place,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, f"exit {process.returncode}: {said}"
    assert "Traceback" not in said, said
    return said


def listens(process: subprocess.Popen) -> bool:
    """Whether Python has come as far as farspan's handler of SIGTERM (Linux): before, it is not farspan that runs."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return True
    caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def job(place: Path, run: Path, *more: str) -> list[str]:
    return ["train", *overrides(place), f"run.dir={run}", f"train.steps={STEPS}", "train.checkpoint_every=1152", *more]


def losses(run: Path) -> dict[int, float]:
    """The newest attempt's loss of every step."""
    return {r["step"]: r["loss"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stop")


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[dict[int, float], float]:
    """The uninterrupted losses, and how long the run takes."""
    began = time.monotonic()
    finish(start(place, *job(place, place / "whole"), cold=False))
    return losses(place / "whole"), time.monotonic() - began


def stop(place: Path, process: subprocess.Popen, run: Path, how: str) -> None:
    if how == "stop":
        asked = start(place, "stop", str(run), cold=False)
        said, _ = asked.communicate(timeout=120)
        # Before the run has its folder, or after its end, there is nothing to stop: that is a user's mistake, exit 2.
        assert asked.returncode in (0, 2) and "Traceback" not in said, said
        if asked.returncode:
            process.send_signal(signal.SIGTERM)
    else:
        process.send_signal(getattr(signal, how))


def usable(place: Path, run: Path, expected: dict[int, float], *, go_on: bool) -> None:
    """The folder is absent or resumes; what was trained is what the uninterrupted run has."""
    wait_for(lambda: not mentioning(f"{MARK}={place}"), 15)
    if not (run / "config.yaml").exists():
        assert not run.exists() or not any(run.iterdir()), list(run.iterdir())
        return
    assert not (run / "stop").exists() and not list(run.glob("checkpoints/*.partial"))
    if (run / "metrics.jsonl").exists() and (seen := losses(run)):
        assert seen.items() <= expected.items()
        assert checkpoint.newest(run / "checkpoints", pytest.fail).name == f"step-{max(seen)}"
    if go_on and (not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < STEPS):
        finish(start(place, "train", f"resume={run}", cold=False))
        assert losses(run) == expected


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_a_stop_at_a_random_moment(place, whole, moment):
    expected, seconds = whole
    rng = random.Random()
    run, how, after = place / f"random-{moment}", rng.choice(["SIGINT", "SIGTERM", "stop"]), rng.uniform(0, seconds)
    print(f"{how} after {after:.2f} of {seconds:.2f} s")  # shown where it fails
    process = start(place, *job(place, run))
    wait_for(lambda: listens(process), 20)
    time.sleep(after)
    stop(place, process, run, how)
    finish(process)
    usable(place, run, expected, go_on=moment % 3 == 0)


@pytest.mark.parametrize("how", [*(pytest.param(how, marks=pytest.mark.slow) for how in ("SIGINT", "SIGTERM")), "stop"])
def test_a_stop_inside_a_checkpoint(place, whole, how):
    run = place / f"checkpoint-{how}"
    process = start(place, *job(place, run), cold=False)
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoints/*.partial")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    stop(place, process, run, how)
    finish(process)
    usable(place, run, whole[0], go_on=how == "stop")


def started(run: Path, process: subprocess.Popen, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Waits until the run has saved, and trained past that."""

    def on() -> bool:
        meanwhile()
        saved = any(run.glob("checkpoints/step-*/manifest.json"))
        return process.poll() is not None or saved and max(losses(run), default=0) > 4

    wait_for(on, 200)
    assert process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["none", "local"])
def test_a_terminal_that_goes_away_is_a_stop(place, whole, cluster):
    """SIGHUP comes from the kernel and, a moment later, from the shell; nothing can be written any more."""
    run = place / f"terminal-{cluster}"
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    said = b""

    def read() -> None:
        nonlocal said
        with contextlib.suppress(BlockingIOError):
            said += os.read(ours, 1 << 16)

    process = subprocess.Popen(
        [*warm.COLD, *job(place, run, f"cluster={cluster}")],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", MARK: str(place)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        started(run, process, read)
        os.close(ours)
        time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(60) == 0, said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert f"stopped after step {max(losses(run))}" in (run / "log.txt").read_text()
    usable(place, run, whole[0], go_on=cluster == "none")


@pytest.mark.slow
def test_a_run_goes_on_where_nobody_reads_it_and_hang_ups_are_ignored(place, whole):
    """`nohup farspan train … | head`: the reader has left, and a SIGHUP to the group is not for it."""
    run = place / "unread"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(place, *job(place, run))
    finally:
        signal.signal(signal.SIGHUP, before)
    process.stdout.close()
    try:
        started(run, process)
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert losses(run) == whole[0]


@pytest.mark.parametrize(
    "how, after",
    [
        ("SIGINT", 0.0),
        ("SIGTERM", 2.0),
        pytest.param("SIGINT", 6.0, marks=pytest.mark.slow),
        pytest.param("stop", 5.0, marks=pytest.mark.slow),
    ],
)
def test_a_stop_while_ray_starts(place, whole, how, after):
    run = place / f"ray-{how}-{after}"
    process = start(place, *job(place, run, "cluster=local"))
    wait_for(lambda: listens(process), 20)
    time.sleep(after)
    stop(place, process, run, how)
    finish(process)
    usable(place, run, whole[0], go_on=False)


def test_hang_ups_come_in_twos_and_count_once(tmp_path):
    """Whatever waits: a run, a sweep here, a sweep on a cluster, any other verb."""

    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.getsignal(signal.SIGHUP)
    with Stopping(tmp_path, lambda line: None) as stopping:
        twice()
        assert not stopping.attend() and (tmp_path / "stop").exists()
        os.kill(os.getpid(), signal.SIGTERM)  # of a machine that shuts down, to those it has hung up on
        assert not stopping.attend()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.attend()
    with SignalCount() as counted:
        twice()
        assert counted.count == 1
    with SignalLatch() as heard:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert heard()
    assert signal.getsignal(signal.SIGHUP) == before


def test_words_that_cannot_be_written_are_lost_and_nothing_else(capfd):
    reader, writer = os.pipe()
    stream = Lasting(os.fdopen(writer, "w"))
    print("read", file=stream, flush=True)
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)
    for _ in range(3):
        print("unread", file=stream, flush=True)
    assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == os.devnull
    full = Lasting(open("/dev/full", "w"))  # noqa: SIM115
    print("lost", file=full, flush=True)
    assert os.readlink(f"/proc/self/fd/{full.fileno()}") == "/dev/full"  # it may have room again
