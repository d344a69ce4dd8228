"""A run's folder: found by its name, claimed by one process at a time, and what is written into it and read from it."""

import fcntl
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any, TextIO

from omegaconf import OmegaConf

from launch.errors import UserError
from launch.paths import RUNS, home
from launch.shell import override
from train.run_config import RunConfig
from train.settings import RunSettings

JOBS = "jobs.jsonl"  # in a run folder: the jobs that it was, one object a line


def saved_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run or a checkpoint. Raises UserError for a file that is none."""
    from train import configuration

    try:
        saved = configuration.read(folder)
        if not isinstance(saved.get("model"), dict):
            raise ValueError("config.yaml: has no model, so it is no run's")
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    return {key: value for key, value in saved.items() if key != "code"}


def run_folder(key: str, value: str) -> Path:
    """The folder of a run given as a path, a name under runs/, or the id of a job that it was. Raises UserError."""
    folder = run_here(key, value)
    if folder is None:
        raise no_such_run(key, value)
    return folder


def run_here(key: str, value: str) -> Path | None:
    """`run_folder`, None where there is none. Raises UserError for a folder that is no run."""
    value = home(key, value)
    for folder in (Path(value), RUNS / value):
        if has(folder, "config.yaml"):
            if is_checkpoint(folder):
                run = folder.absolute().parent.parent
                where = f"; its run is {run}" if has(run, "config.yaml") else ""
                raise UserError(f"{key}={value}: is a checkpoint; expected a run{where}")
            _check_run(folder, f"{key}={value}")
            return folder
    for jobs in (*RUNS.glob(f"*/{JOBS}"), *RUNS.glob(f"*/*/{JOBS}")):  # a sweep's members lie one deeper
        if any(line.get("job") == value for line in _job_lines(jobs)):
            return jobs.parent
    return None


def no_such_run(key: str, value: str) -> UserError:
    """The refusal of a value that names no run."""
    from train.checkpoints.hf_reader import is_folder

    value = home(key, value)
    if any(is_folder(folder) for folder in (Path(value), RUNS / value)):
        return UserError(
            f"{key}={value}: is a folder of Hugging Face's; farspan import {quote(value)} makes a run of it"
        )
    return UserError(f"{key}={value}: no such run; expected a run folder, or the name of one in {RUNS}/")


def has(folder: Path, name: str) -> bool:
    """Says whether a folder, if there is one, has a file of that name."""
    try:
        return (folder / name).exists()
    except OSError:  # a name that is too long to be one
        return False


def is_checkpoint(folder: Path) -> bool:
    """Says whether a folder is a checkpoint, by what lies in it."""
    return has(folder, "manifest.json")


def _check_run(folder: Path, given: str) -> None:
    """Raises UserError where a folder's config.yaml is none of a run, or where reading and writing its files would
    wait, or reach others: a run may come from elsewhere."""
    try:
        saved_config(folder)
    except UserError as error:
        why = str(error).removeprefix(f"{folder}: ")
        raise UserError(f"{given}: is no run that can be read ({why})") from None
    for place in (folder, folder / "plans", folder / "evaluation", *(folder / "evaluation").glob("*/")):
        for path in place.iterdir() if place.is_dir() else ():
            if path.is_symlink() and not path.is_dir():
                raise UserError(f"{given}: {path.relative_to(folder)} is a link; expected a file")
            if not (path.is_file() or path.is_dir()):
                raise UserError(f"{given}: {path.relative_to(folder)} is no regular file")


def _job_lines(path: Path) -> list[dict[str, Any]]:
    """Returns what a run's jobs.jsonl tells; [] where it cannot be read."""
    from data import reading

    try:
        return reading.json_lines(path)
    except ValueError:
        return []


def keep_out(folder: Path, key: str) -> None:
    """Raises UserError for a folder below a checkpoint: nothing is ever written there."""
    place = Path(os.path.realpath(str(folder).replace("\0", "")))  # a NUL is refused where the folder is made
    for above in (place, *place.parents):
        named = re.fullmatch(r"step-\d+", above.name)
        if is_checkpoint(above) and (named or has(above, ".metadata")):  # others have a manifest.json, too
            raise UserError(f"{key}={folder}: must not lie in a checkpoint, {above}")


def stage_name(number: int, length: int) -> str:
    """The folder, in that of a chain, of its stage of that number, from 1."""
    return f"{number}-{length}"


def stages(folder: Path) -> list[Path]:
    """The runs of a chain's stages, the first one first; [] of a single run."""
    stages = saved_config(folder).get("stages") or []
    return [folder / stage_name(i + 1, stage["length"]) for i, stage in enumerate(stages)]


def latest(folder: Path) -> Path:
    """The run that a name means where its weights are asked for: of a chain its last stage that has some."""
    from train.checkpoints.checkpoint import MANIFEST

    begun = (run for run in reversed(stages(folder)) if any((run / "checkpoints").glob(f"*/{MANIFEST}")))
    return next(begun, folder)


def claim(run: RunSettings, *, resumed: bool) -> tuple[RunSettings, TextIO]:
    """The run's name and folder, locked for as long as the returned file is open. Raises UserError when it is taken."""
    name, folder = reserved(run)
    keep_out(folder, "run.dir")
    if not resumed and (has(folder, "config.yaml") or has(folder, "checkpoints")):
        if not locked(folder):
            raise _taken(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise UserError(f"run.dir={folder}: in use by another run (process {lock.read().strip()})") from None
    try:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    except OSError as error:
        if not resumed:
            withdraw(folder)
        raise unwritable(folder, error) from None
    return RunSettings(name=name, dir=str(folder)), lock


def reserved(run: RunSettings) -> tuple[str, Path]:
    """The name and the folder that a run asks for; of one without, the first folder that is free, which is made, since
    another may start in the same second. Raises UserError where it cannot be made."""
    wandb_name = os.environ.get("WANDB_NAME")  # the tracker's word for it, where the configuration has none
    if run.dir:
        return run.name or wandb_name or Path(run.dir).name, Path(run.dir)
    if run.name:
        return run.name, RUNS / run.name
    began = stamp()
    for name in (began, *(f"{began}-{number}" for number in range(2, 1000))):
        try:
            (RUNS / name).mkdir(parents=True)
            return wandb_name or name, RUNS / name
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"run.dir={RUNS / name}: cannot be written ({error.strerror})") from None
    raise UserError(f"run.name=null: must be given: {RUNS}/ has a thousand runs of this second")


def stamp() -> str:
    """The name of a run that has none: date and time."""
    return time.strftime("%Y%m%d-%H%M%S")


def unwritable(folder: Path, error: OSError) -> UserError:
    """One line about a folder that takes no more files."""
    return UserError(f"run.dir={folder}: cannot be written ({error.strerror})")


def _taken(folder: Path) -> UserError:
    """Why a folder cannot be a new run's."""
    if has(folder, "config.yaml"):
        try:
            saved_config(folder)
        except UserError as error:
            why = str(error).removeprefix(f"{folder}: ")
            return UserError(f"run.dir={folder}: holds other files ({why}); expected a new folder")
    return UserError(f"run.dir={folder}: already holds a run; continue it with {override('resume', folder)}")


def last_job(folder: Path) -> tuple[str | None, str | None]:
    """(id, cluster address) of the job that a run was last, or (None, None): it was trained without one."""
    lines = _job_lines(folder / JOBS)
    job, address = (lines[-1].get("job"), lines[-1].get("address")) if lines else (None, None)
    return (job, address) if isinstance(job, str) and isinstance(address, str) else (None, None)


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
    """Says whether a process has the run: it trains, or is about to."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def write_config(folder: Path, config: RunConfig, code: dict[str, Any]) -> None:
    """`config.yaml`, fully resolved, with the code's version. Raises UserError where it cannot be written."""
    text = OmegaConf.to_yaml(OmegaConf.create({**config.to_dict(), "code": code}))
    aside = folder / "config.yaml.partial"
    try:
        aside.write_text(text)
        aside.replace(folder / "config.yaml")
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise unwritable(folder, error) from None


def code_version() -> dict[str, Any]:
    """farspan's version and, in a checkout, its commit and whether files differ from it."""
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    root = Path(__file__).resolve().parents[2]

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        versions: dict[str, Any] = {"farspan": version("farspan")}
    except PackageNotFoundError:
        versions = {}
    try:
        commit = git("rev-parse", "HEAD")
    except (OSError, subprocess.TimeoutExpired):
        return versions
    if not commit:
        return versions
    versions |= {"commit": commit, "modified": bool(git("status", "--porcelain"))}
    versions["branch"] = git("rev-parse", "--abbrev-ref", "HEAD")
    versions["remote"] = _public(git("remote", "get-url", "origin"))
    return {key: value for key, value in versions.items() if value != ""}


def _public(remote: str) -> str:
    """A repository's address without the name and the token that it may hold."""
    return re.sub(r"://[^/@]*@", "://", remote)


def read_summary(folder: Path) -> dict[str, Any]:
    """Returns what the last attempt wrote at its end. Raises ValueError."""
    from data import reading

    return reading.json_object(folder / "summary.json")
