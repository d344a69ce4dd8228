"""Paths in a configuration: home folders behind `~`, and absolute ones in what a run keeps, which is read elsewhere."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.errors import UserError
from train.run_config import ObjectConfig, RunConfig

HOMES = ("resume", "init_from", "run.dir", "run.plot")
_PLACES = ("path", "store", "tokenizer", "local")  # of a corpus
_LONGEST = 255  # bytes of a name in a folder; 4096 of a whole path


def home(key: str, text: str) -> str:
    """A path, `~` and `~user` at its start filled in. Raises UserError for one that no file can have."""
    if "\0" in text:
        raise UserError(f"{key}={text!r}: must be a path: none has a NUL in it")
    try:
        size = max(map(len, os.fsencode(text).split(b"/")))
    except UnicodeEncodeError:
        raise UserError(f"{key}={text!r}: must be a path: the locale cannot write this one") from None
    if size > _LONGEST or len(os.fsencode(text)) > 4000:
        raise UserError(
            f"{key}={text[:40]}…: must be a path: a name in it may have {_LONGEST} bytes, and all of it 4,000"
        )
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise UserError(
            f"{key}={text}: there is no user {text[1:].partition('/')[0]} with a home folder here"
        ) from None


def at_home(config: RunConfig) -> RunConfig:
    """The configuration with the home folder in the place of `~`. Raises UserError."""
    own = {key: value if value is None else home(key, value) for key in HOMES for value in [_value(config, key)]}
    run = replace(config.run, dir=own["run.dir"], plot=own["run.plot"])
    return replace(config, resume=own["resume"], init_from=own["init_from"], run=run)


def _value(config: RunConfig, key: str) -> str | None:
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths of what the run reads, so that it goes on from any folder. `run.dir` and
    `resume` are where a run lies, which it does not need to be told."""
    data = ObjectConfig(_moved(config.data.values))
    if sources := data.get("sources"):
        data = data.having(sources={name: {**each, "data": _moved(each["data"])} for name, each in sources.items()})
    start = config.init_from
    if start is not None:
        named = not Path(start).exists() and (RUNS / start).exists()
        start = absolute(str(RUNS / start) if named else start)
    return replace(config, data=data, init_from=start)


def _moved(corpus: Mapping[str, Any]) -> dict[str, Any]:
    moved = dict(corpus)
    for key in _PLACES:
        if key in corpus:
            may_be_a_name = key == "tokenizer" or key == "path" and corpus.get("corpus") == "hf"
            moved[key] = absolute(corpus[key], may_be_a_name)
    return moved


def absolute(value: Any, may_be_a_name: bool = False) -> Any:
    """An address stays as it is, and so does what may be a name (a tokenizer's, a dataset's) and is no file here."""
    if not isinstance(value, str) or "://" in value or may_be_a_name and not Path(value).expanduser().exists():
        return value
    return str(Path(value).expanduser().absolute())


RUNS = Path("runs")
