"""Eleven kinds of faults on a Ray of two machines: each run ends with the quiet run's numbers, bit for bit.

    python -m tests.launch.faults [NAME ...]

prints a table: seconds from the fault until it was said, until another attempt began, and until its first step. The
machines are two `ray start` on this one (`tests.launch.test_jobs`), which die as machines do: by SIGKILL.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.launch.processes import wait_for
from tests.launch.test_jobs import (
    FARSPAN,
    Cluster,
    farspan,
    in_session,
    job_overrides,
    numbers,
    records,
    steps,
    with_session,
)

TIMEOUT = 20  # cluster.timeout
STEPS = 12


@dataclass
class Scene:
    """A run while it trains, and what it trains on."""

    cluster: Cluster
    run: Path

    def members(self) -> list[dict]:
        return json.loads((self.run / ".ray" / "members.json").read_text())

    def send(self, rank: int, number: int) -> None:
        os.kill(self.members()[rank]["pid"], number)

    def keeper(self) -> int:
        """The rank whose process keeps the store: Ray's rank 0."""
        return next(rank for rank, member in enumerate(self.members()) if member["ray_rank"] == 0)


def killed(scene: Scene) -> None:
    scene.send(1 - scene.keeper(), signal.SIGKILL)


def killed_keeper(scene: Scene) -> None:
    scene.send(scene.keeper(), signal.SIGKILL)


def aborted(scene: Scene) -> None:
    scene.send(1, signal.SIGABRT)


def frozen(scene: Scene) -> None:
    scene.send(1 - scene.keeper(), signal.SIGSTOP)


def frozen_keeper(scene: Scene) -> None:
    scene.send(scene.keeper(), signal.SIGSTOP)


def frozen_saving(scene: Scene) -> None:
    deadline = time.monotonic() + 60
    while not list(scene.run.glob("checkpoints/*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    scene.send(1, signal.SIGSTOP)


def raylet(scene: Scene) -> None:
    """The worker machine's own Ray dies, its processes stay."""
    (pid,) = in_session(scene.cluster.nodes[-1].pid, "raylet/raylet")[:1]
    os.kill(pid, signal.SIGKILL)
    scene.cluster.start()


def machine(scene: Scene) -> None:
    """The worker machine is gone at once; another comes later."""
    with_session(scene.cluster.nodes[-1].pid, signal.SIGKILL)
    time.sleep(10)
    scene.cluster.start()


def leaving(scene: Scene) -> None:
    """The worker machine is taken away politely."""
    scene.cluster.end(scene.cluster.nodes[-1])
    scene.cluster.start()


def driver(scene: Scene) -> None:
    """Our own driver on the head."""
    job = [int(p.name) for p in Path("/proc").glob("[0-9]*") if _is_driver(p, scene.run)]
    os.kill(job[0], signal.SIGKILL)


def _is_driver(folder: Path, run: Path) -> bool:
    try:
        command = (folder / "cmdline").read_bytes()
        return b"multiprocessing.spawn" in command and os.readlink(folder / "fd" / "1") == str(run / ".ray/driver.log")
    except OSError:
        return False


def head(scene: Scene) -> None:
    """The machine with Ray's head is gone at once, and Ray with it; another Ray comes at its address."""
    for node in scene.cluster.nodes:
        with_session(node.pid, signal.SIGKILL)
    scene.cluster.nodes.clear()
    time.sleep(10)
    for _ in range(2):
        scene.cluster.start()
        time.sleep(20)


FAULTS: dict[str, Callable[[Scene], None]] = {
    each.__name__: each
    for each in (
        killed,
        killed_keeper,
        aborted,
        frozen,
        frozen_keeper,
        frozen_saving,
        raylet,
        machine,
        leaving,
        driver,
        head,
    )
}


def _log_times(log: Path, seen: dict[str, float]) -> None:
    text = log.read_text() if log.exists() else ""
    for name, words in (("said", "lost: "), ("again", "another attempt goes on")):
        if words in text:
            seen.setdefault(name, time.monotonic())


def suffer(cluster: Cluster, name: str, quiet: list[tuple]) -> tuple[str, dict[str, float]]:
    """One run with one fault. Returns the line that told of it, and the seconds."""
    run = cluster.place / "runs" / name
    job = job_overrides(cluster, f"run.dir={run}", f"train.steps={STEPS}", f"cluster.timeout={TIMEOUT}")
    job += ["cluster.restarts=3", "train.checkpoint_every=1152"]
    log = cluster.place / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*FARSPAN, "train", "cluster=ray", f"cluster.address=127.0.0.1:{cluster.port}", *job],
            cwd=cluster.place,
            env=cluster.env,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_for(lambda: process.poll() is not None or steps(run) >= 4, 400)
        assert process.poll() is None, log.read_text()
        seen: dict[str, float] = {}
        began = time.monotonic()
        act = threading.Thread(target=FAULTS[name], args=(Scene(cluster, run),))
        act.start()

        def again() -> bool:
            _log_times(log, seen)
            return process.poll() is not None or records(run)[-1]["attempt"] > 1

        wait_for(again, 500)
        seen["step"] = time.monotonic()
        act.join(120)
        assert process.wait(900) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (line,) = re.findall(r"^lost: (.*)", log.read_text(), re.MULTILINE)[:1]
    seen["same"] = began + float(numbers(run) == quiet)
    return line, {key: value - began for key, value in seen.items()}


def main(names: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left of it, however it ends
    place = Path(tempfile.gettempdir()) / f"fs-{secrets.token_hex(4)}"
    place.mkdir(mode=0o700)
    (place / "token").write_text(secrets.token_hex(32))
    (place / "token").chmod(0o600)
    cluster = Cluster(place)
    os.environ.update({k: cluster.env[k] for k in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")})
    failed = []
    try:
        run = place / "runs" / "quiet"
        words = job_overrides(cluster, f"run.dir={run}", "cluster=none", f"train.steps={STEPS}")
        farspan(cluster, "train", *words, timeout=600)
        quiet = numbers(run)
        for node in (1, 2):
            cluster.start()
            wait_for(lambda node=node: cluster.alive() == node, 200)  # type: ignore[misc]
        print(
            "| fault | said after (s) | next attempt (s) | next step (s) | the line |\n|---|---|---|---|---|",
            flush=True,
        )
        for name in names or FAULTS:
            try:
                line, seconds = suffer(cluster, name, quiet)
            except Exception as error:
                failed.append(name)
                print(f"| {name} | FAILED: {str(error)[-1500:]} |", flush=True)
                continue
            shown = " | ".join(f"{seconds.get(key, float('nan')):.0f}" for key in ("said", "again", "step"))
            same = "equal" if seconds["same"] else "DIFFER"
            failed += [] if seconds["same"] else [name]
            print(f"| {name} | {shown} | {same} | {line} |", flush=True)
            wait_for(lambda: cluster.alive() == 2, 200)
    finally:
        for node in reversed(cluster.nodes):
            cluster.end(node)
        if failed:
            print(f"see {place}")
        else:
            shutil.rmtree(place, ignore_errors=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
