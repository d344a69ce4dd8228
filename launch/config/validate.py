"""A configuration held against what it configures: every key known, every value of its declared type.

The constructors' signatures are the schema. A section is checked against its dataclass, a node with `_target_` against
the class that it names, at any depth; what a class accepts beyond its types, its own constructor says. The result is
complete: what the configuration leaves out is there with the constructor's default.
"""

import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from launch.config import files
from launch.config.choices import GIVEN
from launch.errors import UserError
from train.instantiate import ROOMS, allowed, construct
from train.renamed import canonical
from train.run_config import SECTIONS, RunConfig, Stage
from train.settings import section

SCALARS: dict[str, Any] = {"seed": int, "init_from": str | None, "resume": str | None}
LISTS: dict[str, Any] = {"stages": list[Stage]}  # of sections
OBJECTS = ("model", "data", "curriculum", "scheduler", "engine", "optimizer", "schedule", "tracking")
FACTORIES = ("optimizer",)  # of the objects, those that the program calls to get what it needs: `_partial_` nodes

LARGEST = 1 << 63  # of whole numbers, as 64 bits hold them
_MISSING = "???"
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def checked(config: dict[str, Any]) -> RunConfig:
    """The configuration, complete, every key known and every value accepted. Raises UserError."""
    known = [*SECTIONS, *SCALARS, *LISTS, *OBJECTS]
    for key in config:
        if key not in known:
            raise UserError(f"{key}: no such key{nearest(key, known)}")
    for key in known:
        if key not in config:
            options = files.groups().get(key)
            raise UserError(f"{key}: missing; " + (f"accepts {', '.join(options)}" if options else "a run needs it"))
    result = {key: _top(key, value) for key, value in config.items()}
    if "lr" not in result["optimizer"]:
        raise UserError("optimizer.lr: missing; the schedule multiplies it")
    for key, kind in SECTIONS.items():
        _try(key, section, kind, result[key])
    for key, kind in LISTS.items():
        for i, values in enumerate(result[key]):
            _try(f"{key}[{i}]", section, typing.get_args(kind)[0], values)
    for key in OBJECTS:
        if key != "model":  # the largest is built once, where its size is needed
            _try(key, construct, result[key])
    return RunConfig.of(result)


def checked_model(node: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` section, complete, every value of a kind that its constructor accepts: one that is read by itself may
    come from elsewhere. Raises UserError."""
    return _node("model", node)


def _top(key: str, value: Any) -> Any:
    if key in SECTIONS:
        return fields(key, value, SECTIONS[key])
    if key in SCALARS or key in LISTS:
        return _typed(key, value, SCALARS.get(key, LISTS.get(key)))
    if isinstance(value, dict) and value.get("_partial_", False) in (True, False):
        if bool(value.get("_partial_")) != (key in FACTORIES):
            raise UserError(f"{key}._partial_: must be {str(key in FACTORIES).lower()}")
    return _node(key, value)


def build(config: RunConfig) -> Any:
    """The model of a checked configuration, on the meta device, and its optimizer tried. Raises ValueError."""
    import torch

    from train.optim.build import try_optimizer
    from train.optim.transfer import check_transfer

    with torch.device("meta"):
        try:
            model = config.model.build()
        except (ArithmeticError, RuntimeError, TypeError) as error:
            raise ValueError(f"model: cannot be built: {error}") from None
    try_optimizer(config.optimizer)
    check_transfer(config.optimizer, model)
    return model


def fields(path: str, values: Any, constructor: Callable[..., Any], *, given: Collection[str] = ()) -> dict[str, Any]:
    """The values of a constructor's parameters, checked and with its defaults; `given` ones are not the user's.

    Raises UserError for a key that it does not know, a value of another type, or one that it requires.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path}={_shown(values)}: expected a section with keys")
    at = f"{path}." if path else ""  # none where the keys stand by themselves: those of a verb
    parameters, is_open = parameters_of(constructor)
    hints = hints_of(constructor)
    ours = [key for key in parameters if key not in given]
    result = {}
    for key, value in values.items():
        if key in given and key in parameters:
            raise UserError(f"{at}{key}: not a setting: the program gives it; accepts {', '.join(ours)}")
        if key not in parameters and not is_open:
            raise UserError(f"{at}{key}: no such key{nearest(str(key), ours, prefix=at)}")
        result[key] = _typed(f"{at}{key}", value, hints.get(key, Any))
    for key in ours:
        if key in result:
            continue
        default = parameters[key].default
        if default is inspect.Parameter.empty:
            raise UserError(f"{at}{key}: missing; give it as {at}{key}=VALUE")
        if _is_plain(default) and not constructor.__module__.startswith("torch."):  # those change between releases
            result[key] = asdict(default) if is_dataclass(default) else default  # type: ignore[arg-type]
    return result


def parameters_of(constructor: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """A constructor's named parameters, and whether it takes others as well."""
    parameters = inspect.signature(constructor).parameters
    named = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def hints_of(constructor: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(constructor.__init__)  # type: ignore[misc]
    except (NameError, TypeError):  # a name that exists for the type checker only: the constructor is the judge
        return {}


def class_of(path: str, target: Any) -> type:
    """The class that a `_target_` names. Raises UserError."""
    if not isinstance(target, str) or not allowed(target):
        raise UserError(f"{path}={_shown(target)}: must be a class of {', '.join(ROOMS)}")
    target = canonical(target)
    room, _, name = target.rpartition(".")
    try:
        module = import_module(room)
    except ModuleNotFoundError as error:
        if error.name and f"{room}.".startswith(f"{error.name}."):
            raise UserError(f"{path}={target}: there is no module {error.name}") from None
        raise UserError(f"{path}={target}: {error.name} is not installed here") from None
    except ImportError as error:
        raise UserError(f"{path}={target}: cannot be imported: {error}") from None
    homes = getattr(module, "HOMES", ())
    if name in homes:  # of the others' modules none is imported
        return getattr(module, name)
    named = [*vars(module), *homes]
    classes = {k for k in named if isinstance(v := getattr(module, k), type) and allowed(f"{v.__module__}.")}
    if name not in classes:
        raise UserError(f"{path}={target}: no such class{nearest(name, classes, prefix=f'{room}.')}")
    return getattr(module, name)


def nearest(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """The end of a line about `word`: the nearest of the known ones, or all of them when none is near."""
    by_lower = {name.lower(): name for name in known if not name.startswith("_") and name != word}
    close = get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    if close:
        return f"; nearest: {prefix}{by_lower[close[0]]}"
    return f"; accepts {', '.join(sorted(by_lower.values()))}" if by_lower else ""


def _node(path: str, node: Any, kind: Any = object) -> dict[str, Any]:
    """An object: the class that it names, its arguments, and whether it builds a `kind` (a class)."""
    if not isinstance(node, dict):
        raise UserError(f"{path}={_shown(node)}: expected an object, a section with _target_")
    if "_target_" not in node:
        raise UserError(f"{path}._target_: missing; it names the class to build")
    target = class_of(f"{path}._target_", node["_target_"])
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False) and not issubclass(target, kind):
        from models.hub.architecture import target as name_of

        raise UserError(f"{path}._target_={node['_target_']}: must be a {name_of(kind)}")
    head = {"_target_": node["_target_"]}
    if "_partial_" in node:
        head["_partial_"] = _typed(f"{path}._partial_", node["_partial_"], bool)
    own = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    return {**head, **fields(path, own, target, given=GIVEN if head.get("_partial_") else ())}


def _typed(path: str, value: Any, hint: Any) -> Any:
    """The value as its hint declares it: 1e6 passes for a whole number, true and "3" do not. Raises UserError."""
    if value == _MISSING:
        raise UserError(f"{path}: missing; give it as {path}=VALUE")
    if typing.get_origin(hint) is typing.Literal:
        hint = str  # a text that is none of them is refused by the constructor, which says more
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(path, value, arguments)
    if hint is Any or hint is object or isinstance(hint, typing.TypeVar):
        return _untyped(path, value)
    if hint in (None, type(None)) and value is None:
        return None
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if not -LARGEST <= value < LARGEST and (hint is int or not abs(value) <= sys.float_info.max):
            raise _out_of_range(path, value, hint)
        if hint is float:
            return float(value)
        if isinstance(value, int) or value.is_integer():
            return int(value)
    if origin is Callable:
        factory = isinstance(value, dict) and value.get("_partial_") is True
        return _node(path, value, arguments[-1] if arguments and factory else object)
    if isinstance(origin, type) and is_dataclass(origin) and not (isinstance(value, dict) and "_target_" in value):
        return fields(path, value, origin)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict) and "_target_" not in value:
        return {k: _typed(f"{path}.{k}", v, arguments[1] if arguments else Any) for k, v in value.items()}
    if isinstance(origin, type) and issubclass(origin, Iterable) and origin is not str and isinstance(value, list):
        return _elements(path, value, hint)
    if isinstance(value, dict) and "_target_" in value and isinstance(origin, type) and origin not in _WORDS:
        return _node(path, value, origin)
    raise _wrong(path, value, hint)


def _untyped(path: str, value: Any) -> Any:
    """A value of no declared type: the objects in it are checked."""
    if isinstance(value, list):
        return [_typed(f"{path}[{i}]", child, Any) for i, child in enumerate(value)]
    if not isinstance(value, dict):
        return value
    return _node(path, value) if "_target_" in value else {k: _typed(f"{path}.{k}", v, Any) for k, v in value.items()}


def _one_of(path: str, value: Any, hints: tuple[Any, ...]) -> Any:
    errors = []
    for hint in sorted(hints, key=lambda hint: type(value) is not hint):  # 1.0 of `int | float` stays a float
        try:
            return _typed(path, value, hint)
        except UserError as error:
            errors.append(error)
    deeper = (error for error in errors if isinstance(error, _RangeError) or not str(error).startswith(f"{path}="))
    raise next(deeper, _wrong(path, value, typing.Union[hints]))  # noqa: UP007


def _elements(path: str, value: list[Any], hint: Any) -> list[Any]:
    """A list, each of its elements checked; a tuple's length too. It stays a list: YAML has no other."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and Ellipsis not in arguments:
        if len(value) != len(arguments):
            raise _wrong(path, value, hint)
        return [_typed(f"{path}[{i}]", v, h) for i, (v, h) in enumerate(zip(value, arguments, strict=True))]
    return [_typed(f"{path}[{i}]", v, arguments[0] if arguments else Any) for i, v in enumerate(value)]


def _try(path: str, make: Callable[..., Any], *arguments: Any) -> None:
    """Calls a constructor; what it refuses becomes one line with the full key and the nearest of what it accepts."""
    try:
        make(*arguments)
    except (TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        key = re.match(r"[\w.\[\]]+(?==)", line)
        if key and not key[0].startswith((f"{path}.", f"{path}=")):
            line = f"{path}.{line}"
        elif not key and not line.startswith(path):
            line = f"{path}: {line}"
        match = re.search(r"(?:=(\S+): (?:must be|expected) one of|got '(\S+)', accepts) ([^;]+)$", line)
        word = (match[1] or match[2]).lower() if match else ""
        if match and (close := get_close_matches(word, match[3].split(", "), n=1, cutoff=0.4)):
            line += f"; nearest: {close[0]}"
        raise UserError(line) from None


def _is_plain(default: Any) -> bool:
    """Says whether YAML can hold a constructor's default."""
    kinds = (bool, int, float, str, list, dict, type(None))
    return isinstance(default, kinds) or is_dataclass(default) and not isinstance(default, type)


def _wrong(path: str, value: Any, hint: Any) -> UserError:
    accepted = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    shown, more = _shown(value), ""
    if isinstance(value, str):
        if re.fullmatch(r"[-+]?\d[\d_]*(\.\d*)?([eE][-+]?\d+)?|true|false|null", value, re.IGNORECASE):
            digits = re.fullmatch(r"[-+]?\d{19,}", value)  # which Python may not even read as a number
            shown, more = (shown, ", of at most 64 bits") if digits else (f"'{shown}'", ", without quotes")
        elif any(typing.get_origin(kind) in (list, Sequence) for kind in accepted):
            more = f"; one is written [{value}]"
    elif str in accepted and isinstance(value, int | float | list) and "[" not in path:
        more = f"; as text: {path}=\"'{shown}'\""
    return UserError(f"{path}={shown}: expected {words(hint)}{more}")


class _RangeError(UserError):
    """A number that nothing can be computed with: inf, NaN, more than 64 bits hold."""


def _out_of_range(path: str, value: int | float, hint: Any) -> _RangeError:
    more = " that is finite" if hint is float else ", of at most 64 bits" if abs(value) <= sys.float_info.max else ""
    return _RangeError(f"{path}={_shown(value)}: expected {words(hint)}{more}")


def words(hint: Any, many: bool = False) -> str:
    """A type in words: `list[str] | None` is "a list of texts or null"."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [h for h in arguments if not (isinstance(h, type) and h.__module__.startswith("torch"))]
        kinds = [h for h in kinds if not (h is int and float in kinds)]
        return " or ".join(dict.fromkeys(words(h, many) for h in kinds))
    if origin is typing.Literal:
        return _PLURALS[str] if many else _WORDS[str]
    if hint in _WORDS:
        return _PLURALS.get(hint, _WORDS[hint]) if many else _WORDS[hint]
    if origin is Callable or not isinstance(origin, type):
        return "an object, a section with _target_"
    if is_dataclass(origin) or issubclass(origin, Mapping):
        return "a section with keys"
    if issubclass(origin, Iterable):
        count = f"{len(arguments)} " if origin is tuple and Ellipsis not in arguments else ""
        return f"a list of {count}{words(arguments[0], many=True) if arguments else 'values'}"
    return "an object, a section with _target_"


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {_shown(child)}" for key, child in value.items()) + "}"
    elif isinstance(value, list):
        text = f"[{', '.join(map(_shown, value))}]"
    else:
        text = (
            {None: "null", True: "true", False: "false"}[value]
            if value is None or isinstance(value, bool)
            else str(value)
        )
    return text if len(text) <= 80 else f"{text[:77]}..."
