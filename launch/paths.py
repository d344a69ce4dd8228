"""Paths in a configuration: home folders behind `~`, and absolute ones in what a run keeps, which is read elsewhere."""

import os
from pathlib import Path
from typing import Any

from launch.errors import UserError

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


def at_home(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the home folder in the place of `~`. Raises UserError."""
    for key in HOMES:
        *above, last = key.split(".")
        node = config[above[0]] if above else config
        if isinstance(value := node.get(last), str):
            node[last] = home(key, value)
    return config


def make_absolute(config: dict[str, Any]) -> None:
    """The paths of what a run reads, in its configuration itself, so that it goes on from any folder. `run.dir` and
    `resume` are where a run lies, which it does not need to be told."""
    pass

    data = config.get("data") or {}
    corpora = [data, *((source or {}).get("data") or {} for source in (data.get("sources") or {}).values())]
    for corpus in corpora:
        for key in _PLACES:
            if key in corpus:
                may_be_a_name = key == "tokenizer" or key == "path" and corpus.get("corpus") == "hf"
                corpus[key] = absolute(corpus[key], may_be_a_name)
    if isinstance(told := config.get("init_from"), str):
        named = not Path(told).exists() and (RUNS / told).exists()
        config["init_from"] = absolute(str(RUNS / told) if named else told)


def absolute(value: Any, may_be_a_name: bool = False) -> Any:
    """An address stays as it is, and so does what may be a name (a tokenizer's, a dataset's) and is no file here."""
    if not isinstance(value, str) or "://" in value or may_be_a_name and not Path(value).expanduser().exists():
        return value
    return str(Path(value).expanduser().absolute())


RUNS = Path("runs")
