"""The teacher of a run that distils: found, and held against the run's model and its layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.cluster.find_run import run_folder
from launch.config.model import model_of
from launch.run.rundir import is_checkpoint, latest
from train.run_config import RunConfig

KEY = "train.distill.teacher"


def with_teacher(config: RunConfig, model: Any, *, here: bool = True) -> RunConfig:
    """The configuration with its teacher's checkpoint in place of the run that is named. Raises ValueError.

    model: the run's, on the meta device. here: whether the teacher can be read from this machine.
    """
    settings = config.train.distill
    if settings.teacher is None:
        return config
    _layout(config)
    if not here:
        return config
    from train.distill import refuse, section_of

    path = _found(settings.teacher, config)
    try:
        teacher = model_of(section_of(path))
        refuse(settings, teacher, model)
    except ValueError as error:
        line = " ".join(str(error).split())
        known = line.startswith(("teacher=", "target="))
        raise ValueError(f"train.distill.{line}" if known else f"{KEY}={settings.teacher}: {line}") from None
    distill = replace(settings, teacher=str(path.resolve()))
    return replace(config, train=replace(config.train, distill=distill))


def _layout(config: RunConfig) -> None:
    """Raises ValueError for what a second model beside the first one does not do."""
    parallel, why = config.parallel, f"with {KEY}"
    for key in ("tensor", "pipeline"):
        if (size := getattr(parallel, key)) > 1:
            raise ValueError(f"parallel.{key}={size}: must be 1 {why}")
    if config.engine.target.rpartition(".")[2] != "FSDP":
        raise ValueError(f"engine={config.engine.target.rpartition('.')[2].lower()}: must be fsdp {why}")
    if (tokens := config.train.span_tokens) is not None:
        raise ValueError(f"train.span_tokens={tokens}: must be null {why}")


def _found(value: str, config: RunConfig) -> Path:
    """The checkpoint, or folder of Hugging Face's, that a teacher is. Raises ValueError, and UserError for no run."""
    from train.checkpoints import checkpoint, hf_reader

    path = Path(value)
    if hf_reader.is_folder(path):
        return path
    if is_checkpoint(path):
        try:
            checkpoint.verify(path)
        except checkpoint.DamagedError as error:
            raise ValueError(f"{KEY}={value}: this checkpoint is damaged ({error})") from None
        return path
    newest = checkpoint.newest(latest(run_folder(KEY, value, config.cluster)) / "checkpoints", lambda line: None)
    if newest is None:
        raise ValueError(f"{KEY}={value}: has no complete checkpoint")
    return newest
