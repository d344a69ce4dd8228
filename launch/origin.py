"""What a run starts from with `init_from`: the model that it then has, and the tokens that its weights know."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.config import conf
from launch.rundir import RUNS, saved_config
from launch.user import UserError


def model_of(overrides: list[str]) -> dict[str, Any] | None:
    """The model of what a run starts from, where the overrides choose none and it is here. Raises UserError."""
    chosen = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    init_from = chosen.get("init_from", "null").strip("'\"")
    if init_from == "null" or "model" in chosen or conf.written(chosen)[1]["model"] != conf.defaults()["model"]:
        return None
    from train import published

    for folder in (Path(init_from), RUNS / init_from):
        if (folder / "config.yaml").exists():
            return saved_config(folder).get("model")
    if not published.is_folder(Path(init_from)):
        return None
    try:
        return published.Published(Path(init_from)).model
    except ValueError as error:
        raise UserError(f"init_from={init_from}: {error}") from None


def same_tokens(path: Path, batches: Any, say: Callable[[str], None]) -> None:
    """Says where the weights that a run starts from were trained on another tokenizer's tokens."""
    from data.tokenizer_files import card_of, differ
    from train import published

    file = path / "tokenizer.json"
    card = card_of(path) if published.is_folder(path) else json.loads(file.read_text()) if file.exists() else None
    tokenizer = getattr(batches, "tokenizer", None)
    if card is not None and tokenizer is not None and differ(card, tokenizer.card()):
        say(f"init_from={path}: was trained on tokens of another tokenizer; data.tokenizer={path} takes that one")
