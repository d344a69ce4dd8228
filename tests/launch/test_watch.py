"""A rank that stops answering: who is blamed, where, how soon, and that nothing is left of the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from launch.run.failure import Failure, Outcome, verdict
from launch.run.status import _still
from launch.world.spawn import spawn
from launch.world.watchdog import Heartbeat, blame
from parallel.liveness import TIMEOUT, Liveness, Wait
from tests.jobs import overrides
from tests.launch.processes import all_gone, mentioning, pids, wait_for
from tests.launch.test_stop import MARK, finish, losses, start
from train.guards.hang_timeout import FIRST_S, LEAST_S, Patience

STATE = Wait("layers.3", "state", "all-gather")
PAIR = Wait("layers.5", "keys and values", "receive", (2,))


def told(beat: int = 1, wait: Wait | None = STATE, quiet: float = 60.0, signs: int = 7, **more: object) -> Heartbeat:
    return Heartbeat(beat, signs, quiet, wait, "", "", **more)  # type: ignore[arg-type]


def board(*tellings: Heartbeat | None) -> dict[int, Heartbeat | None]:
    return dict(enumerate(tellings))


def test_a_rank_that_tells_nothing_new_is_frozen_where_the_others_wait() -> None:
    before = board(told(1), told(1), told(1, None), told(1))
    now = board(told(5), told(4), told(1, None), told(6))
    line = "rank 2 stopped answering in layers.3, state (all-gather): no word for 61 s"
    assert blame(before, now, 60, 61) == line
    now[1] = told(4, PAIR)  # waits for that very rank
    assert blame(before, now, 60, 61) == line.replace(
        "layers.3, state (all-gather)", "layers.5, keys and values (receive)"
    )
    now[1] = told(4, replace_ranks(PAIR, (3,)))  # waits for another, that waits
    assert blame(before, now, 60, 61) == line
    assert blame({**before, 2: None}, {**now, 2: None}, 60, 61) == line  # it never told anything
    assert blame({**before, 0: None}, now, 60, 61) == line  # late, not frozen
    assert blame({0: None}, {0: None, 1: told(5)}, 60, 61) == line.replace("rank 2", "rank 0")  # the store's silence
    now[2] = told(1, None, left=True)  # it has ended its work
    assert blame(before, now, 60, 61) is not None and "rank 2" not in str(blame(before, now, 60, 61))


def replace_ranks(wait: Wait, ranks: tuple[int, ...]) -> Wait:
    return wait._replace(ranks=ranks)


def test_of_ranks_that_are_all_alive_the_one_outside_of_collectives_is_awaited() -> None:
    before = board(*[told(1)] * 3)
    busy = replace(told(5, None, 61), at="step.py:7 (sleep)")
    line = "rank 1 stopped answering before layers.3, state (all-gather): busy elsewhere for 61 s, at step.py:7 (sleep)"
    assert blame(before, board(told(5), busy, told(5)), 60, 61) == line
    assert blame(before, board(told(5), replace(busy, quiet=3.0), told(5)), 60, 61) is None  # it moves
    crossed = board(told(5), told(5, PAIR), told(5))
    assert str(blame(before, crossed, 60, 61)).startswith("the ranks wait for each other for 61 s: rank 0 in layers.3")


def test_where_only_the_pulse_counts_nobody_is_blamed_for_computing() -> None:
    before = board(told(1), told(1), told(1))
    now = board(told(5), replace(told(5, None, 61), doing="writing a checkpoint"), told(5))
    assert blame(before, now, None, 61) is None and blame(before, now, 600, 61) is None
    now[1] = replace(told(1, None), doing="writing a checkpoint")
    before[1] = now[1]
    now[0], now[2] = told(5, None), told(5, None)
    line = "rank 1 stopped answering, writing a checkpoint: no word for 61 s"
    assert blame(before, now, None, 61) == blame(before, now, 600, 61) == line


def test_what_is_told_survives_the_store() -> None:
    from dataclasses import asdict

    for each in (told(), told(wait=PAIR), told(wait=None)):
        assert Heartbeat.parse(json.dumps(asdict(each))) == each


def test_the_verdict_is_the_watchs() -> None:
    stopped = Failure(0, 2.0, "rank 2 stopped answering", "", stopped=True)
    peer = Failure(1, 1.0, "RuntimeError: x", "Connection closed by peer")
    outcome = verdict([peer, stopped], [(3, "was killed (SIGKILL)")], Path("/tmp"))
    assert outcome.reason == "rank 2 stopped answering (more: /tmp/error.txt)" and outcome.lost


def test_patience_follows_the_steps() -> None:
    here = Liveness()
    patience = Patience(None, here)
    assert here.patience == FIRST_S
    for seconds in (100.0, 9.0, 9.0):
        patience.stepped(seconds)
    assert here.patience == here.pulse == 180.0  # 20 medians
    with patience.during("writing a checkpoint"):
        assert here.patience == FIRST_S and here.doing == "writing a checkpoint"
        assert here.pulse == 180.0  # whatever it does, it runs
    assert here.patience == 180.0 and here.doing == ""
    for _ in range(20):
        patience.stepped(0.1)
    assert here.patience == LEAST_S
    patience.end()
    assert here.patience is None and here.pulse == LEAST_S
    short = Patience(5.0, here)
    assert here.patience == FIRST_S and here.pulse == LEAST_S  # the first two steps are not the others
    short.stepped(1.0)
    short.stepped(1.0)
    assert here.patience == here.pulse == 5.0 < TIMEOUT.total_seconds()


def test_the_oldest_wait_is_where_one_is() -> None:
    here = Liveness()
    assert here.wait is None
    with here.waiting(STATE):
        with here.waiting(PAIR):
            assert here.wait == STATE
        assert here.signs == 3
    assert here.wait is None and here.signs == 4


STOPPED = {
    "freeze": "rank 1 stopped answering in layers.3, state (all-gather): no word for",
    "freeze_host": "rank 0 stopped answering in layers.3, state (all-gather): no word for",
    "freeze_saving": "rank 1 stopped answering, writing a checkpoint: no word for",
    "busy": "rank 1 stopped answering before layers.3, state (all-gather): busy elsewhere for",
}
WORLDS = {**dict.fromkeys([*STOPPED, "pause"], 2), "freeze_keeper": 3}  # entries of tests.launch.entries, and ranks


def _spawn(entry: str, run_dir: Path) -> tuple[Outcome, float]:
    """The end of a world, and when it came."""
    run_dir.mkdir()
    named, given = f"tests.launch.entries:{entry}", {"dir": str(run_dir)}
    workers = WORLDS[entry]
    outcome = spawn(named, given, workers=workers, run_dir=run_dir, device="cpu", threads=1, tick=lambda: None)
    return outcome, time.monotonic()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Future[tuple[Outcome, float]]]]]:
    """A folder for each world, and its end. They wait beside each other: none does anything but wait."""
    place = tmp_path_factory.mktemp("worlds")
    with ThreadPoolExecutor(len(WORLDS)) as pool:
        ends = {}
        for entry in WORLDS:
            ends[entry] = pool.submit(_spawn, entry, place / entry)
            begun = place / entry  # one after the other: a start changes what this process is for a moment
            wait_for(lambda begun=begun, end=ends[entry]: len(pids(begun)) == WORLDS[begun.name] or end.done(), 60)
        yield place, ends


@pytest.mark.dist
@pytest.mark.parametrize("entry", STOPPED)
def test_a_rank_that_stops_ends_the_world(worlds, entry: str) -> None:
    place, ends = worlds
    outcome, ended = ends[entry].result(60)
    assert not outcome.ok and outcome.exit_code == 1 and outcome.lost
    assert str(outcome.reason).startswith(STOPPED[entry]), outcome.reason
    assert "main thread" in (place / entry / "error.txt").read_text()
    (stopped,) = (place / entry).glob("stopped-*")
    assert ended - float(stopped.read_text()) < 20  # 3 s of patience, 5 s for the others' last words
    all_gone(pids(place / entry))


@pytest.mark.dist
def test_the_rank_that_keeps_the_store_is_found_whichever_it_is(worlds) -> None:
    """All others find it, and blame no third one: the store tells nothing of anybody."""
    place, ends = worlds
    outcome, ended = ends["freeze_keeper"].result(60)
    (stopped,) = (place / "freeze_keeper").glob("stopped-*")
    assert not outcome.ok and ended - float(stopped.read_text()) < 30
    lines = [path.read_text() for path in (place / "freeze_keeper").glob("line-*")]
    words = "rank 2 stopped answering in layers.3, state (all-gather): no word for"
    assert lines and all(line.startswith(words) for line in lines), lines


@pytest.mark.dist
def test_a_world_that_is_paused_as_a_whole_goes_on(worlds) -> None:
    outcome, _ = worlds[1]["pause"].result(60)
    assert outcome.ok, outcome


def _ranks(place: Path, launcher: int) -> list[int]:
    """The processes of a run's ranks (Linux), in order: children of the fork server, which is the launcher's."""
    parents = {}
    for line in mentioning(f"{MARK}={place}"):
        pid = int(line.split()[0])
        with contextlib.suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return sorted(pid for pid, parent in parents.items() if parents.get(parent) == launcher)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_with_a_frozen_rank_ends_and_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", *overrides(tmp_path), f"run.dir={run}", "train.steps=400", "train.checkpoint_every=1536"]
    process = start(tmp_path, *words, "cluster.timeout=6", "cluster.workers=2")
    try:
        wait_for(lambda: list(run.glob("checkpoints/step-*/manifest.json")) or process.poll() is not None, 100)
        wait_for(lambda: (run / "metrics.jsonl").exists() and max(losses(run), default=0) > 6, 60)
        frozen = _ranks(tmp_path, process.pid)[1]
        os.kill(frozen, signal.SIGSTOP)
        began = time.monotonic()
        said = finish(process, code=1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert time.monotonic() - began < 40
    assert "failed: rank 1 stopped answering in " in said and "no word for" in said, said
    wait_for(lambda: not mentioning(f"{MARK}={tmp_path}"), 15)
    steps = max(losses(run)) + 2
    finish(start(tmp_path, "train", f"resume={run}", f"train.steps={steps}", cold=False))
    assert max(losses(run)) == steps


def test_a_run_that_stands_still_is_told_so() -> None:
    def still(ago: float, gaps: list[float], timeout: float | None = None) -> float | None:
        times, now = [time.time() - ago], sum(gaps)
        records = [{"time": times[0] - now}]
        for gap in gaps:
            records.append({"time": records[-1]["time"] + gap})
        return _still(records, timeout)

    assert still(29, [0.1] * 9) is None and 30 <= (still(31, [0.1] * 9) or 0) < 40  # half a minute: of LEAST_S
    assert still(9, [0.1] * 9, 20.0) is None and still(11, [0.1] * 9, 20.0) is not None
    assert still(90, [10.0] * 9) is None and still(101, [10.0] * 9) is not None  # half of twenty steps
    assert still(70, [0.1] * 8 + [40.0]) is None and still(81, [0.1] * 8 + [40.0]) is not None  # an evaluation was long
    assert still(1e6, [0.1]) is None  # nothing is known of its steps
