"""Workers come from a server that the launcher forks with all it has imported, unless it has threads of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = """
import gc, sys, threading, time
from pathlib import Path

import torch
from launch import collection
from launch.world import spawn

collection.seldom()
torch.launchers = True
lock = open(sys.argv[1] + "/lock", "w")
{begun}
print("written once", end="")
config = {{"dir": sys.argv[1], "file": lock.fileno(), "threads": 2}}
out = spawn.spawn("tests.launch.entries:inherited", config, workers=1, run_dir=Path(sys.argv[1]) / "run", device="cpu",
                  threads=2, tick=lambda: None)
assert out.ok, out
"""


def run(folder: Path, begun: str, **environment: str) -> list[str]:
    """The words that a worker notes: where torch is from, where the launcher's file leads, thresholds, a sum."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER.format(begun=begun), str(folder)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "written once"
    return (folder / "inherited-0").read_text().split()


def test_a_worker_has_the_launchers_modules_and_none_of_its_files(tmp_path: Path) -> None:
    words = run(tmp_path, "")
    assert words == ["forked", os.devnull, "700", "True", "500000.0"]


@pytest.mark.parametrize(
    "begun",
    [
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "torch.set_num_threads(2); torch.ones(1_000_000).exp().sum()",  # a pool of OpenMP: a fork would wait for it
    ],
    ids=["of Python", "of OpenMP"],
)
def test_a_launcher_with_threads_starts_a_fresh_server(tmp_path: Path, begun: str) -> None:
    assert run(tmp_path, begun, OMP_NUM_THREADS="2")[0] == "fresh"
