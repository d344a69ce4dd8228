"""Configures a run from overrides: a new one, or one that is resumed."""

from pathlib import Path
from typing import Any

from launch.cluster.find_run import run_folder
from launch.config.compose import checked, composed, groups
from launch.errors import UserError
from launch.preflight import init_from
from launch.run.rundir import is_checkpoint, saved_config
from train.run_config import RunConfig


def configure(overrides: list[str]) -> RunConfig:
    """The configuration of a new run, or of a resumed one: what it was, with the overrides on top. Raises UserError."""

    wanted = composed(overrides, init_from.model_of(overrides))
    if wanted.resume is None:
        return init_from.replayed(wanted)
    if wanted.init_from is not None:
        raise UserError(f"init_from={wanted.init_from}: must be null with resume={wanted.resume}, a run that has begun")
    path = Path(wanted.resume)
    named = is_checkpoint(path)
    folder = _run_of(path) if named else run_folder("resume", wanted.resume, wanted.cluster)
    saved = init_from.own_tokens(saved_config(folder), folder)
    if "train" not in saved:
        raise UserError(f"resume={wanted.resume}: is an import and has trained nothing; expected init_from=")
    overlay(saved, wanted.to_dict(), overrides)
    saved["resume"] = str(path if named else folder)
    saved["run"]["dir"] = str(folder)
    return checked(saved)


def _run_of(path: Path) -> Path:
    """The run that goes on where one of its checkpoints is named. Raises UserError for one that lies elsewhere."""
    from train.checkpoints import checkpoint

    run = checkpoint.run_of(path)
    if run is None or not (run / "config.yaml").exists():
        raise UserError(
            f"resume={path}: is a checkpoint without its run; init_from={path} begins a run from its weights"
        )
    return run


def overlay(saved: dict[str, Any], wanted: dict[str, Any], overrides: list[str]) -> None:
    """Puts what `overrides` choose, and `wanted` has, into a saved configuration; and sections that came since, as they
    are. Raises UserError."""
    for override in overrides:
        key, _, package = override.lstrip("+").split("=")[0].partition("@")
        path = (package or key).split(".")
        if path[0] == "experiment" or override.startswith("~"):
            raise UserError(f"{override}: cannot be changed of a run; give the keys that should differ")
        if path == ["cluster"] and saved["cluster"].get("kind") == wanted["cluster"]["kind"]:
            saved["cluster"]["address"] = wanted["cluster"]["address"]
            continue  # it was there before: its workers, threads and limits are its own
        _copy(wanted, saved, path if package or path[0] not in groups() or len(path) > 1 else path[:1])
    if any(override.lstrip("+").startswith("train.tokens=") for override in overrides):
        saved["train"]["steps"] = wanted["train"]["steps"]  # of the two budgets, the one that is given now
    for key in ("evaluate", "simulation", "cost", "stages", "convert"):
        saved.setdefault(key, wanted[key])


def _copy(source: dict[str, Any], into: dict[str, Any], path: list[str]) -> None:
    for key in path[:-1]:
        source, into = source[key], into.setdefault(key, {})
    if path[-1] in source:
        into[path[-1]] = source[path[-1]]
