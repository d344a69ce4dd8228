"""A user's own modules, of any name, are nothing to a run in their folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import apart
from tests.jobs import overrides
from tests.launch.processes import ROOT

TRAPS = ("train", "data", "models", "parallel", "conf", "torch", "ray", "numpy", "random", "queue", "tokenize")


def _traps(place: Path, *more: str) -> Path:
    """Modules that note that they were imported, beside packages of the same names."""
    place.mkdir()
    for name in (*TRAPS, *more):
        (place / f"{name}.py").write_text(f"open({str(place / 'sprung')!r}, 'a').write({name!r} + ' ')\n")
    return place


def _farspan(place: Path, words: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    script = place.parent / "bin" / "farspan"  # as pip writes it: with a folder of its own on the path
    script.parent.mkdir(exist_ok=True)
    script.write_text("import sys\nfrom launch.cli import main\nsys.exit(main())\n")
    return subprocess.run(
        [sys.executable, str(script), *words],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("cluster, before", [("none", ""), ("none", os.pathsep), ("local", "")])
def test_modules_of_the_working_folder_are_not_imported(tmp_path: Path, cluster: str, before: str) -> None:
    """Under both launchers; also with an empty entry of PYTHONPATH, which stands for the working folder."""
    # With an empty entry Python itself takes the folder's modules for its own, before farspan runs.
    place = _traps(tmp_path / "place", *(() if before else ("launch",)))
    if before:
        for name in ("random", "queue", "tokenize"):
            (place / f"{name}.py").unlink()
    words = ["train", *overrides(tmp_path), "train.steps=1", "run.dir=run", f"cluster={cluster}"]
    done = _farspan(place, words, PYTHONPATH=f"{before}{ROOT}")
    assert done.returncode == 0, done.stderr
    assert (place / "run" / "summary.json").exists()
    assert not (place / "sprung").exists(), (place / "sprung").read_text()


def test_the_working_folder_leaves_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = [str(ROOT), str(tmp_path / "below"), sys.prefix]
    assert apart.clean(["", ".", str(tmp_path), *kept, f"{tmp_path}/below/.."]) == kept
    monkeypatch.chdir(ROOT)  # a checkout: it is ours
    assert apart.clean(["", *kept]) == [str(ROOT), *kept]


def test_what_is_started_is_shielded_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{ROOT}")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with apart.shielded():
        code = "import sys; print(sys.path)"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        if sys.version_info >= (3, 11):
            assert "''" not in said and str(tmp_path) not in said
    assert os.environ["PYTHONPATH"] == f"{os.pathsep}{ROOT}" and "PYTHONSAFEPATH" not in os.environ


@pytest.mark.slow
def test_scripts_of_users_find_our_packages_as_the_page_says(tmp_path: Path) -> None:
    """Beside a train.py of theirs each command of docs/install.md works, and none works without its precaution."""
    section = (ROOT / "docs" / "install.md").read_text().split("## Your own scripts")[1].split("\n## ")[0]
    commands = re.findall(r"`((?:PYTHONSAFEPATH=1 )?python (?:-P )?(?:\S+\.py|-m pytest \S+))`", section)
    assert len(commands) == 4, commands
    (tmp_path / "train.py").touch()
    (tmp_path / "data").mkdir()  # nothing but a folder
    uses = "from data import Data\nfrom train.timeout import within\n"
    (tmp_path / "scripts").mkdir()
    for path in (tmp_path / "use.py", tmp_path / "scripts" / "use.py", tmp_path / "test_use.py"):
        path.write_text(uses + "def test_it(): pass\n")

    def code(command: str) -> int:
        shell = f'python() {{ "{sys.executable}" "$@"; }}; {command}'
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=env, capture_output=True, timeout=100).returncode

    if sys.version_info < (3, 11):  # neither -P nor PYTHONSAFEPATH
        commands = [command for command in commands if "scripts/" in command]
    assert {command: code(command) for command in commands} == dict.fromkeys(commands, 0)
    for command in ("python use.py", "python -m pytest test_use.py", "python -c 'import train.timeout'"):
        assert code(command) != 0, command
