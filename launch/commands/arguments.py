"""Arguments that no configuration describes: words, flags, and key=value read into a dataclass."""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from launch.errors import UserError

Kind = TypeVar("Kind")

PLACES = {"run.dir": "FOLDER", "cluster.address": "http://HOST:8265"}  # what the values of these keys look like


class JobArguments(NamedTuple):
    """word: the job. address: cluster.address, where given. flagged: whether a flag was given."""

    word: str
    address: str | None
    flagged: bool


def run_and_rest(arguments: list[str], example: str) -> tuple[str, list[str]]:
    """The run, which comes first, and what follows it. Raises UserError."""
    if not arguments or "=" in arguments[0] and not Path(arguments[0]).exists():
        raise UserError(f"RUN: missing; expected a run folder (farspan {example})")
    return arguments[0], arguments[1:]


def job_arguments(verb: str, arguments: list[str], *, flags: tuple[str, ...] = (), word: bool = True) -> JobArguments:
    """One job, or with word=False none, cluster.address and the flags. Raises UserError."""
    words, address, flagged = [], None, False
    for argument in arguments:
        if argument in flags:
            flagged = True
        elif argument.startswith("cluster.address="):
            address = argument.partition("=")[2]
        elif argument.startswith("-") or "=" in argument:
            accepted = ", ".join([f"cluster.address={PLACES['cluster.address']}", *flags[:1]])
            raise UserError(f"{argument}: not understood; accepts {accepted}")
        else:
            words.append(argument)
    if word and len(words) != 1:
        raise UserError(f"JOB: expected one, got {len(words)} (farspan {verb} JOB; farspan list shows them)")
    if not word and words:
        raise UserError(f"{words[0]}: {verb} takes no job")
    return JobArguments("".join(words), address, flagged)


def places(arguments: list[str]) -> dict[str, str]:
    """The values of PLACES that were given, which is all that may be. Raises UserError."""
    given = {}
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key not in PLACES:
            close = get_close_matches(key, PLACES, n=1, cutoff=0.5)
            near = f"; nearest: {close[0]}" if close else ""
            raise UserError(f"{argument}: no such argument; accepts {', '.join(PLACES)}{near}")
        if not value:
            raise UserError(f"{argument}: expected {key}={PLACES[key]}")
        given[key] = value
    return given


def positional(
    verb: str,
    arguments: list[str],
    kind: Callable[..., Kind],
    names: tuple[str, ...],
    *,
    least: int,
    text: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
) -> tuple[list[str], Kind]:
    """The words, at least so many of `names`, and the key=value as a `kind`, each value as YAML has it.

    text: keys whose values stay text. also: keys whose values are words. Raises UserError.
    """
    words = [argument for argument in arguments if not re.match(r"[a-z_.]+=", argument)]
    values = {}
    for key, _, value in (argument.partition("=") for argument in arguments if argument not in words):
        if key in also:
            words.append(value)
        else:
            values[key] = value if key in text else _yaml(value)
    if not least <= len(words) <= len(names):
        missing = names[len(words)] if len(words) < least else words[len(names)]
        what = "missing" if len(words) < least else "one too many"
        raise UserError(f"{missing}: {what}; expected farspan {verb} {' '.join(names)} [key=value ...]")
    return words, request(kind, values)


def request(kind: Callable[..., Kind], values: dict[str, Any], keys: Mapping[str, str] | None = None) -> Kind:
    """A `kind` of these values, each checked. keys: a field's key, where it has another. Raises UserError."""
    from launch.config.validate import fields

    keys = keys or {}
    try:
        return kind(**fields("", {_field(key, keys): value for key, value in values.items()}, kind))
    except UserError as error:
        key, rest = re.match(r"(\w*)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
        raise UserError(f"{keys.get(key, key)}{rest}") from None
    except ValueError as error:
        raise UserError(str(error)) from None


def asks_for_configuration(arguments: list[str]) -> list[str] | None:
    """The overrides beside --cfg, or beside what Hydra's users write: -c, --cfg job, --cfg=job; None without it."""
    overrides, asks = [], False
    for word in arguments:
        option, equals, what = word.partition("=")
        if option not in ("--cfg", "-c"):
            overrides.append(word)
            continue
        asks = True
        if equals and what != "job":
            raise UserError(f"{word}: accepts --cfg, or --cfg job")
    if not asks:
        return None
    return [word for word in overrides if word not in ("job", "--resolve")]  # what Hydra takes besides: it is resolved


def number(text: str) -> object:
    """An int, a float, null, true or false; else the text."""
    if len(text) > 40:  # Python reads no number of 5,000 digits
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"null": None, "true": True, "false": False}.get(text, text)


def _field(key: str, keys: Mapping[str, str]) -> str:
    return next((field for field, name in keys.items() if name == key), key)


def _yaml(text: str) -> Any:
    """Takes a value that is no YAML, or a number of thousands of digits, as text."""
    import yaml

    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text
