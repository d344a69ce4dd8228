"""The checkpoint that a path names, and its tokenizer."""

import os
import sys
from pathlib import Path
from typing import Any

from launch.errors import UserError
from launch.run.rundir import is_checkpoint, latest, run_folder


def checkpoint_of(value: str) -> Path:
    """The newest complete checkpoint of a run, or of the last stage of a chain that has one, or the one named itself,
    wherever it lies. Raises UserError."""
    from train.checkpoints import checkpoint

    path = Path(value)
    if is_checkpoint(path):
        try:
            checkpoint.verify(path)
        except checkpoint.DamagedError as error:
            raise UserError(f"RUN={value}: this checkpoint is damaged ({error})") from None
        return path
    folder = latest(run_folder("RUN", value))
    newest = checkpoint.newest(folder / "checkpoints", lambda line: print(line, file=sys.stderr))
    if newest is None:
        raise UserError(f"RUN={value}: has no complete checkpoint")
    return newest


def has_average(saved: Path) -> bool:
    """Says whether a checkpoint holds an average of the weights beside them."""
    from train.checkpoints import checkpoint

    return bool(checkpoint.manifest(saved).get("average"))


def tokenizer_of(saved: Path, key: str) -> Any:
    """The tokenizer of a checkpoint. Raises UserError for one that spells no text."""
    from data import reading
    from data.tokenizer import from_card

    if not os.path.lexists(saved / "tokenizer.json"):
        raise UserError(f"{key}: has no tokenizer: its tokens spell no text")
    try:
        return from_card(reading.json_object(saved / "tokenizer.json"))
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None
