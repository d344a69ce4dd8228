"""Machines that die hard, without a cluster: what a patient attempt does, and what is said."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from launch.cluster import driver, inspection
from launch.cluster.controller import _judge
from launch.cluster.inspection import inspect_machines
from launch.errors import UserError
from launch.run.failure import Failure, verdict
from launch.world.job import Job


class Machines:
    """Two machines as Ray tells of them, each with a port of its own that dies with it."""

    def __init__(self) -> None:
        self.open = {"a" * 8: socket.create_server(("127.0.0.1", 0)), "b" * 8: socket.create_server(("127.0.0.1", 0))}
        self.ports = {id: each.getsockname()[1] for id, each in self.open.items()}
        self.known = dict.fromkeys(self.open, True)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": id,
                "NodeName": f"n-{id[0]}",
                "NodeManagerAddress": "127.0.0.1",
                "NodeManagerPort": self.ports[id],
                "Alive": alive,
                "Resources": {"CPU": 1.0},
            }
            for id, alive in self.known.items()
        ]

    def die(self, id: str) -> None:
        self.open.pop(id).close()

    def come(self, id: str) -> None:
        self.open[id] = socket.create_server(("127.0.0.1", 0))
        self.ports[id], self.known[id] = self.open[id].getsockname()[1], True


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    two = Machines()
    monkeypatch.setattr(ray, "nodes", two.nodes)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(inspection, "_TURN_S", 0.02)
    monkeypatch.setattr(inspection, "_compare", lambda job, ids: inspection.Sight("3", "2", "2", None))
    yield two
    for each in two.open.values():
        each.close()


def _job(run: Path, *, patient: bool) -> Job:
    (run / ".ray").mkdir(exist_ok=True)
    return Job("a:b", {}, 2, run, "cpu", None, "auto", patient, {"data": 1, "sequence": 2})


def _then(*acts: Callable[[], object]) -> tuple[list[str], Callable[[str], None]]:
    """What is said, and a `say` that does the next act at each line."""
    said: list[str] = []
    left = list(acts)

    def say(line: str) -> None:
        said.append(line)
        if left:
            left.pop(0)()

    return said, say


def test_a_machine_that_ray_still_counts_is_seen_to_be_lost_and_waited_for(machines: Machines, tmp_path: Path) -> None:
    machines.die("b" * 8)
    said, say = _then(
        lambda: machines.known.update({"b" * 8: False}),  # Ray finds out
        lambda: machines.come("c" * 8),  # another one comes
    )
    assert inspect_machines(_job(tmp_path, patient=True), say)
    assert said[0] == "a machine was lost: n-b (bbbbbb); waiting until Ray has found out"
    assert said[1].startswith("waiting for machines: cluster.workers=2: the cluster has room for 1 (n-a: 1)")
    assert said[2].startswith("checks passed: 2 workers on 2 machines")


def test_a_machine_that_dies_while_it_is_looked_at_ends_no_patient_attempt(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[list[str]] = []

    def look(job: Job, ids: list[str]) -> inspection.Sight:
        looks.append(ids)
        if len(looks) < 3:
            raise UserError("cluster.address: n-b (bbbbbb) was lost while it was looked at")
        return inspection.Sight("3", "2", "2", None)

    monkeypatch.setattr(inspection, "_compare", look)
    said, say = _then()
    assert inspect_machines(_job(tmp_path, patient=True), say)
    assert said[0] == "waiting for machines: cluster.address: n-b (bbbbbb) was lost while it was looked at"
    assert len(looks) == 3 and len(said) == 2
    looks.clear()
    with pytest.raises(UserError, match="was lost while it was looked at"):
        inspect_machines(_job(tmp_path, patient=False), say)
    looks.clear()
    said, say = _then((tmp_path / "stop").touch)
    assert not inspect_machines(_job(tmp_path, patient=True), say)


def test_a_patient_attempt_waits_for_a_ray_whose_head_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Context:
        gcs_address = "127.0.0.1:1"

    def init(**arguments: Any) -> None:
        calls.append(arguments["address"])
        if len(calls) < 3:
            raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(driver, "_JOIN_S", 0.02)
    said, say = _then()
    assert driver._join_ray(_job(tmp_path, patient=True), say) and len(calls) == 3
    line = "cluster.address=auto: no Ray to join from this machine (Could not find any running Ray instance.)"
    assert said == [f"waiting for Ray: {line}"]
    calls.clear()
    with pytest.raises(UserError, match="no Ray to join"):
        driver._join_ray(_job(tmp_path, patient=False), say)
    calls.clear()
    _, say = _then((tmp_path / "stop").touch)
    assert not driver._join_ray(_job(tmp_path, patient=True), say)


def test_the_line_says_that_a_machine_was_lost(machines: Machines, tmp_path: Path) -> None:
    job = _job(tmp_path, patient=False)
    where = {0: "a" * 8, 1: "b" * 8}
    members = {ours: {"rank": ours, "node": id, "address": "127.0.0.1"} for ours, id in where.items()}
    assert driver._lost_with_machines(job, members) == {}
    machines.die("b" * 8)
    lost = driver._lost_with_machines(job, members)
    assert lost == {1: "was lost with its machine, n-b (bbbbbb)"}
    outcome = verdict([], list(lost.items()), tmp_path)
    assert outcome.reason == "rank 1 was lost with its machine, n-b (bbbbbb)" and outcome.lost
    frozen = Failure(0, 1.0, "rank 1 stopped answering in layers.3", "", stopped=True)  # as its peer saw it
    assert verdict([frozen], list(lost.items()), tmp_path) == outcome
    machines.known.pop("b" * 8)
    assert driver._lost_with_machines(job, members) == {1: "was lost with its machine on 127.0.0.1"}


def test_the_line_says_that_the_head_was_lost(machines: Machines, tmp_path: Path) -> None:
    job = _job(tmp_path, patient=False)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        (tmp_path / ".ray" / driver.HEAD).write_text(address)
        assert driver.head_answers(tmp_path)
    assert not driver.head_answers(tmp_path)
    members = {0: {"rank": 0, "node": "a" * 8, "address": "127.0.0.1"}}
    assert driver._lost_with_machines(job, members) == {0: driver.HEAD_LOST}

    class Process:
        exitcode = -6

        def join(self, timeout: float) -> None:
            pass

    outcome = _judge(None, Process(), tmp_path)  # type: ignore[arg-type]
    assert outcome.reason == "the head of Ray was lost with its machine" and outcome.lost
    report = driver.Report(False, line="RaySystemError: x", trace="a trace")
    assert str(_judge(report, Process(), tmp_path).reason).startswith("the head of Ray was lost with its machine (full")  # type: ignore[arg-type]
