"""A run's folder: found by its name, claimed by one process at a time, and what is written into it and read from it."""

import fcntl
import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any, TextIO

from omegaconf import OmegaConf

from launch.paths import home
from launch.shell import override
from launch.user import UserError

RUNS = Path("runs")
JOBS = "jobs.jsonl"  # in a run folder: the jobs that it was, one object a line


def saved_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run."""
    saved = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(saved, dict)
    return {str(key): value for key, value in saved.items() if key != "code"}


def run_folder(key: str, value: str, cluster: dict[str, Any] | None = None) -> Path:
    """The folder of a run given as a path, a name under runs/, or the id of a job. Raises UserError.

    An id is looked for in the runs here, then, where `cluster` says which, among the cluster's jobs.
    """
    value = home(key, value)
    for folder in (Path(value), RUNS / value):
        if (folder / "config.yaml").exists():
            return folder
    for told in (*RUNS.glob(f"*/{JOBS}"), *RUNS.glob(f"*/*/{JOBS}")):  # a sweep's members lie one deeper
        if any(json.loads(line)["job"] == value for line in told.read_text().splitlines()):
            return told.parent
    from train.published import is_folder

    if cluster is not None and cluster["kind"] == "ray" and "/" not in value:
        from launch import jobs

        return jobs.folder_of(value, cluster["address"], key)
    if any(is_folder(folder) for folder in (Path(value), RUNS / value)):
        raise UserError(
            f"{key}={value}: is a folder of Hugging Face's; farspan import {quote(value)} makes a run of it"
        )
    raise UserError(f"{key}={value}: no such run; expected a run folder, or the name of one in {RUNS}/")


def stage_name(number: int, length: int) -> str:
    """The folder, in that of a chain, of its stage of that number, from 1."""
    return f"{number}-{length}"


def stages(folder: Path) -> list[Path]:
    """The runs of a chain's stages, the first one first; [] of a single run."""
    told = saved_config(folder).get("stages") or []
    return [folder / stage_name(i + 1, stage["length"]) for i, stage in enumerate(told)]


def latest(folder: Path) -> Path:
    """The run that a name means where its weights are asked for: of a chain its last stage that has some."""
    from train.checkpoint import MANIFEST

    begun = (run for run in reversed(stages(folder)) if any((run / "checkpoints").glob(f"*/{MANIFEST}")))
    return next(begun, folder)


def claim(config: dict[str, Any], *, resumed: bool) -> tuple[Path, TextIO]:
    """The run's folder, locked for as long as the returned file is open. Raises UserError when it is taken."""
    name, folder = reserved(config["run"])
    if not resumed and ((folder / "config.yaml").exists() or (folder / "checkpoints").exists()):
        if not locked(folder):
            raise UserError(f"run.dir={folder}: already holds a run; continue it with {override('resume', folder)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"run.dir={folder}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise UserError(f"run.dir={folder}: in use by another run (process {lock.read().strip()})") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    config["run"] = {"name": name, "dir": str(folder)}
    return folder, lock


def reserved(run: dict[str, Any]) -> tuple[str, Path]:
    """The name and the folder that a run asks for; of one without, the first folder that is free, which is made, since
    another may start in the same second. Raises UserError where it cannot be made."""
    if run["name"] or run["dir"]:
        return run["name"] or Path(run["dir"]).name, Path(run["dir"]) if run["dir"] else RUNS / run["name"]
    began = stamp()
    for name in (began, *(f"{began}-{number}" for number in range(2, 1000))):
        try:
            (RUNS / name).mkdir(parents=True)
            return name, RUNS / name
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"run.dir={RUNS / name}: cannot be written ({error.strerror})") from None
    raise UserError(f"run.name=null: must be given: {RUNS}/ has a thousand runs of this second")


def stamp() -> str:
    """What a run is called that has no name: date and time."""
    return time.strftime("%Y%m%d-%H%M%S")


def last_job(folder: Path) -> tuple[str | None, str | None]:
    """(id, cluster address) of the job that a run was last, or (None, None): it was trained without one."""
    try:
        told = json.loads((folder / JOBS).read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None, None
    return told["job"], told["address"]


def withdraw(folder: Path) -> None:
    """Takes back what `claim` and `write_config` left of a run that was refused before its first step."""
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
        return
    for name in ("config.yaml", ".lock", JOBS, "stop", "error.txt", "log.txt", "tokenizer.json", "corpus.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / ".ray", ignore_errors=True)
    with suppress(OSError):  # what else lies there is not ours
        folder.rmdir()


def locked(folder: Path) -> bool:
    """Whether a process has the run: it trains, or is about to."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def write_config(folder: Path, config: dict[str, Any], code: dict[str, Any]) -> None:
    """`config.yaml`, fully resolved, with the code's version."""
    text = OmegaConf.to_yaml(OmegaConf.create({**config, "code": code}))
    aside = folder / "config.yaml.partial"
    aside.write_text(text)
    aside.replace(folder / "config.yaml")


def code_version() -> dict[str, Any]:
    """farspan's version and, in a checkout, its commit and whether files differ from it."""
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    root = Path(__file__).resolve().parents[1]

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found: dict[str, Any] = {"farspan": version("farspan")}
    except PackageNotFoundError:
        found = {}
    try:
        commit = git("rev-parse", "HEAD")
    except (OSError, subprocess.TimeoutExpired):
        return found
    if not commit:
        return found
    found |= {"commit": commit, "modified": bool(git("status", "--porcelain"))}
    found |= {"branch": git("rev-parse", "--abbrev-ref", "HEAD"), "remote": _public(git("remote", "get-url", "origin"))}
    return {key: value for key, value in found.items() if value != ""}


def _public(remote: str) -> str:
    """A repository's address without the name and the token that it may hold."""
    return re.sub(r"://[^/@]*@", "://", remote)


def read_summary(folder: Path) -> dict[str, Any]:
    """What the last attempt wrote at its end."""
    return json.loads((folder / "summary.json").read_text())
