"""The entry point of a job, without a cluster: which interpreter it runs in, and what that lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import package
from launch.cluster.inspection import Sight
from launch.runner.submit import ENTRYPOINT
from tests.launch.processes import ROOT

_RAYLET = """
import subprocess, sys
supervisor = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1], shell=True).returncode)"
sys.exit(subprocess.run([sys.executable, "-c", supervisor, sys.argv[1]]).returncode)
"""


def _python(folder: Path, word: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "python").write_text(f"#!/bin/sh\necho {word} $@\n")
    (folder / "python").chmod(0o755)
    return folder / "python"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("folder, quoted", [("ray/bin", False), ("with a blank/bin", True)])
def test_a_job_runs_in_the_interpreter_that_runs_ray(tmp_path: Path, folder: str, quoted: bool) -> None:
    first = _python(tmp_path / "first", "first")
    ours = _python(tmp_path / folder, "ours")
    command = [str(ours), "/setup_worker.py", "--session-dir=x"]
    told = f"--python_worker_command={subprocess.list2cmdline(command)}"

    def said(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", _RAYLET, ENTRYPOINT, *arguments],
            env={"PATH": f"{first.parent}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    assert "\n" not in ENTRYPOINT
    assert said("--gcs-address=x", told) == "ours -m launch.runner.job_main\n"
    assert ('"' in told) is quoted
    assert said() == "first -m launch.runner.job_main\n"  # no Ray above: whatever there is


def test_what_the_interpreter_lacks_is_one_line(tmp_path: Path) -> None:
    """Without its site-packages it lacks everything."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "launch.runner.job_main"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "FARSPAN_JOB_COPY": str(tmp_path / "copy")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (line,) = done.stdout.splitlines()
    assert done.returncode == 2 and not done.stderr, done.stderr
    needed = " ".join(package.NEEDS.values())
    assert line.startswith(f"refused: {sys.executable} lacks hydra-core, numpy, ")
    assert line.endswith(f"install: {sys.executable} -m pip install {needed}")
    assert package.missing() is None and Sight("3", "2", "2", None).lacks is None


def test_all_that_is_needed_everywhere_is_a_dependency() -> None:
    told = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("\n]")[0]
    assert all(f'"{name.strip(chr(39))}>=' in told for name in package.NEEDS.values())
