"""From command-line overrides to a checked configuration.

Hydra composes; then every key and every leaf's type is held against the signature of what it configures: the class a
`_target_` names, or a section's dataclass. `+key=…` and `++key=…`, which Hydra lets through, are caught like any other.
"""

import inspect
import re
import typing
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from launch.user import UserError
from train.construct import ROOMS, allowed
from train.settings import ClusterSettings, ParallelSettings, PrecisionSettings, RunSettings, TrainSettings

CONF = Path(__file__).resolve().parents[1] / "conf"
SECTIONS: dict[str, type] = {
    "run": RunSettings,
    "train": TrainSettings,
    "parallel": ParallelSettings,
    "cluster": ClusterSettings,
    "precision": PrecisionSettings,
}
SCALARS: dict[str, Any] = {"seed": int, "init_from": str | None, "resume": str | None}
OBJECTS = ("model", "data", "scheduler", "engine", "optimizer", "schedule", "tracking")


def groups() -> dict[str, list[str]]:
    """Each configuration group and its options."""
    return {
        folder.name: sorted(p.stem for p in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir()
    }


def composed(overrides: list[str]) -> dict[str, Any]:
    """The resolved configuration of the default job under `overrides`. Raises UserError."""
    for override in overrides:
        if override.startswith("-"):
            raise UserError(f"{override}: no such option; a run is described by key=value (farspan train --help)")
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"{override}: expected key=value{_nearest(override, {*groups(), *SECTIONS, *SCALARS})}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            resolved = OmegaConf.to_container(compose("train", overrides), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, overrides)) from None
    assert isinstance(resolved, dict)
    return checked(typing.cast("dict[str, Any]", resolved))


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with every key known and every leaf of its declared type. Raises UserError."""
    known = [*SECTIONS, *SCALARS, *OBJECTS]
    result = {}
    for key, value in config.items():
        if key not in known:
            raise UserError(f"{key}: no such key{_nearest(key, known)}")
        if key in SCALARS:
            result[key] = _leaf(key, value, SCALARS[key])
        elif key in SECTIONS:
            result[key] = fields(key, value, SECTIONS[key])
        else:
            result[key] = _node(key, value)
    missing = [key for key in known if key not in config]
    if missing:
        raise UserError(f"{missing[0]}: missing")
    return result


def _node(path: str, value: Any) -> Any:
    """Checks a subtree of objects: `_target_` nodes against their constructors, anything else child by child."""
    if isinstance(value, list):
        return [_node(f"{path}[{i}]", child) for i, child in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {key: _node(f"{path}.{key}", child) for key, child in value.items()}
    target = value["_target_"]
    if not allowed(str(target)):
        raise UserError(f"{path}._target_={target}: must be a class of {', '.join(ROOMS)}")
    try:
        constructor = get_object(target)
    except Exception:
        raise UserError(f"{path}._target_={target}: cannot be found") from None
    own = {key: child for key, child in value.items() if key not in ("_target_", "_partial_")}
    built = fields(path, own, constructor, complete=not value.get("_partial_", False))
    return {**{key: value[key] for key in ("_target_", "_partial_") if key in value}, **built}


def fields(path: str, values: dict[str, Any], constructor: Any, *, complete: bool = False) -> dict[str, Any]:
    """Checks keys and leaves against a constructor's signature; `complete`: none that it requires may be missing."""
    if not isinstance(values, dict):
        raise UserError(f"{path}={values!r}: expected a section with keys")
    signature = inspect.signature(constructor)
    hints = typing.get_type_hints(constructor.__init__)
    result = {}
    for key, value in values.items():
        if key not in signature.parameters:
            raise UserError(f"{path}.{key}: no such key{_nearest(key, signature.parameters, prefix=f'{path}.')}")
        hint = hints.get(key, Any)
        if isinstance(hint, type) and is_dataclass(hint):
            result[key] = fields(f"{path}.{key}", value, hint)
        elif isinstance(value, dict) or isinstance(value, list) and any(isinstance(v, dict) for v in value):
            result[key] = _node(f"{path}.{key}", value)
        else:
            result[key] = _leaf(f"{path}.{key}", value, hint)
    for key, parameter in signature.parameters.items():
        if complete and parameter.default is parameter.empty and key not in values:
            raise UserError(f"{path}.{key}: missing")
    return result


def _leaf(key: str, value: Any, hint: Any) -> Any:
    """The value as its declared type: 1e6 passes for a whole number, true and "3" do not."""
    if hint is Any or isinstance(hint, typing.TypeVar):
        return value
    accepted = typing.get_args(hint) or (hint,)
    if isinstance(value, bool) and bool not in accepted or isinstance(value, str) and not _takes_text(accepted):
        raise UserError(f"{key}={value}: expected {_words(hint)}")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError:
        raise UserError(f"{key}={value}: expected {_words(hint)}") from None
    except Exception:  # torch.optim's hints are not all understood; its constructor is the judge
        return value


def _takes_text(accepted: tuple[Any, ...]) -> bool:
    return any(kind in (str, Any, object) for kind in accepted)


def _words(hint: Any) -> str:
    if isinstance(hint, type) and hint.__module__.startswith("torch"):
        return "a tensor"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    parts = typing.get_args(hint) if typing.get_origin(hint) not in (list, tuple, dict) else ()
    return " or ".join(
        names.get(part) or _words(part) if parts else names.get(part, str(part)) for part in parts or (hint,)
    )


def _nearest(word: str, known: Any, lead: str = "; nearest: ", prefix: str = "") -> str:
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    short = sorted(word for word in known if "." not in word and not word.startswith("_"))
    return f"{lead}{prefix}{close[0]}" if close else f"; accepts {', '.join(short)}"


def _one_line(error: Exception, overrides: list[str]) -> str:
    """Hydra's and OmegaConf's errors as one line with the nearest spelling."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: not an override that can be read; expected key=value, text with blanks or = in quotes"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        if isinstance(error.__cause__, OmegaConfBaseException) and "not in" not in str(error.__cause__):
            return f"{key}: {str(error.__cause__).splitlines()[0]}"
        return f"{key}: no such key{_nearest_path(key)}"
    if match := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        options = groups().get(match[1], [])
        return f"{match[1]}={match[2]}: no such option; accepts {', '.join(options)}{_nearest_only(match[2], options)}"
    if match := re.search(r"Could not override '?([\w@/.]+)'?\.\s*No match in the defaults list", text):
        return f"{match[1]}: no such key{_nearest_path(match[1])}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: missing; give it as {error.full_key}=VALUE"
    return " ".join(text.split())[:300]


def _nearest_only(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1, cutoff=0.3)
    return f"; nearest: {close[0]}" if close else ""


def _nearest_path(key: str) -> str:
    """The nearest full key of the default configuration."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        default = OmegaConf.to_container(compose("train"), resolve=False)
    return _nearest(key, _paths(default, ""))


def _paths(node: Any, path: str) -> list[str]:
    if not isinstance(node, dict):
        return [path]
    below = [p for key, child in node.items() for p in _paths(child, f"{path}.{key}" if path else str(key))]
    return ([path] if path else []) + below
