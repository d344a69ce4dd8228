"""Phases against a clock moved by hand, and the peak of memory against memory that is really taken."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from train.metrics.timing import PHASES, PhaseTimes, peak_memory_bytes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def spent(phases: PhaseTimes) -> dict[str, float]:
    return {name: seconds for name, seconds in phases.take().items() if seconds}


def test_a_nested_phase_stops_the_outer_clock() -> None:
    clock = Clock()
    phases = PhaseTimes(clock=clock)
    clock.now += 50  # nobody's
    with phases("backward"):
        clock.now += 1
        with phases("wait"):
            clock.now += 2
            with phases("logging"):
                clock.now += 4
        clock.now += 8
    clock.now += 50  # nobody's
    with phases("wait"):
        clock.now += 16
    assert spent(phases) == {"backward": 9.0, "wait": 18.0, "logging": 4.0}


def test_a_phase_may_be_nested_in_itself() -> None:
    clock = Clock()
    phases = PhaseTimes(clock=clock)
    with phases("wait"):
        clock.now += 1
        with phases("wait"):
            clock.now += 2
        clock.now += 4
    assert spent(phases) == {"wait": 7.0}


def test_take_inside_an_open_phase_splits_it() -> None:
    clock = Clock()
    phases = PhaseTimes(clock=clock)
    with phases("forward"):
        clock.now += 1
        with phases("logging"):
            clock.now += 2
            assert spent(phases) == {"forward": 1.0, "logging": 2.0}
            clock.now += 4
        clock.now += 8
    assert spent(phases) == {"forward": 8.0, "logging": 4.0}


def test_take_names_every_phase_and_starts_afresh() -> None:
    clock = Clock()
    phases = PhaseTimes(clock=clock)
    with phases("data"):
        clock.now += 1
    assert phases.take() == {**dict.fromkeys(PHASES, 0.0), "data": 1.0}
    assert phases.take() == dict.fromkeys(PHASES, 0.0)


def test_an_exception_leaves_the_phase() -> None:
    clock = Clock()
    phases = PhaseTimes(clock=clock)
    with pytest.raises(RuntimeError), phases("data"):
        clock.now += 1
        raise RuntimeError
    clock.now += 2
    assert spent(phases) == {"data": 1.0}


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'foward'.*forward, backward"):
        PhaseTimes()("foward")


def test_a_phase_is_cheap() -> None:
    """Beside two readings of the clock in a context of Python's own, in turn: measured 0.6 of it."""

    def seconds(context: Callable[[], AbstractContextManager[None]]) -> float:
        start = time.process_time()
        for _ in range(1000):
            with context():
                pass
        return time.process_time() - start

    @contextmanager
    def clocked() -> Iterator[None]:
        time.perf_counter()
        yield
        time.perf_counter()

    phases = PhaseTimes()
    rounds = [(seconds(lambda: phases("wait")), seconds(clocked)) for _ in range(20)]
    assert min(ours for ours, _ in rounds) < 1.5 * min(plain for _, plain in rounds)


def _peaks(pipe) -> None:  # type: ignore[no-untyped-def]
    before = peak_memory_bytes("cpu")
    held = bytearray(64 << 20)
    held[:: 1 << 12] = b"x" * (len(held) >> 12)
    during = peak_memory_bytes("cpu")
    del held
    pipe.send((before, during, peak_memory_bytes("cpu")))


def test_peak_memory_is_in_bytes_and_is_this_process_s_own() -> None:
    ballast = bytearray(256 << 20)
    ballast[:: 1 << 12] = b"x" * (len(ballast) >> 12)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_peaks, args=(theirs,))
    child.start()
    before, during, after = ours.recv()
    child.join()
    assert before > 1 << 20
    if sys.platform == "linux":
        assert before < len(ballast)  # not inherited from us
    assert 60 << 20 < during - before < 80 << 20
    assert after > before + (60 << 20)  # a peak stays
