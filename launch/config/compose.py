"""Composes a checked configuration from command-line overrides.

Hydra composes the files of conf/ and the overrides; `check` holds the result against the constructors. Hydra's
`+` and `++` are allowed and make no difference: a key that its constructor knows can be given, any other cannot. What
Hydra would let through or explain at length is found here, and costs one line.
"""

import copy
import re
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.config import choices, files
from launch.config.files import CONF, groups
from launch.config.validate import (
    LISTS,
    OBJECTS,
    SCALARS,
    SECTIONS,
    checked,
    class_of,
    fields,
    hints_of,
    nearest,
    parameters_of,
)
from launch.errors import UserError
from launch.paths import at_home
from launch.shell import override, quote
from train.renamed import canonical, with_canonical_names
from train.run_config import RunConfig

__all__ = ["CONF", "checked", "composed", "fields", "groups"]


_KEY = r"\+*[A-Za-z_][\w.@/]*"
_OTHER = "of_init_from"  # the option that a model from elsewhere becomes


class ParsedOverride(NamedTuple):
    """An override that has been understood: its text without `+`, its parts, and whether it had a `+`."""

    text: str
    parts: Override
    adds: bool

    @property
    def name(self) -> str:
        """The key, or the group and where it is placed: `mixer@model.blocks.gla.mixer`."""
        return self.parts.key_or_group + (f"@{self.parts.package}" if self.parts.package is not None else "")


def composed(overrides: list[str], model: dict[str, Any] | None = None) -> RunConfig:
    """The resolved, complete and checked configuration of the default job under `overrides`. Raises UserError.

    model: a complete `model` section that stands in place of the default job's, below the overrides.
    """
    read = _last_choices([_read(override) for override in overrides])
    config = _compose(read, model)
    try:
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_unresolved(error, config)) from None
    assert isinstance(resolved, dict)
    _one_budget(read, resolved)
    try:
        return at_home(checked(with_canonical_names({str(key): value for key, value in resolved.items()})))
    except UserError as error:
        raise UserError(_as_given(str(error), read)) from None


def _one_budget(read: list[ParsedOverride], config: dict[Any, Any]) -> None:
    """Keeps the budget that is given, tokens or steps, whatever an option says of the other. Raises UserError where
    both are."""
    texts = {each.name: each.text.partition("=")[2] for each in read if not each.parts.is_delete()}
    whole = next((each.parts.value() for each in read if each.name == "train"), None)
    texts |= {f"train.{key}": str(value) for key, value in whole.items()} if isinstance(whole, dict) else {}
    tokens, train = texts.get("train.tokens"), config.get("train")
    if tokens in (None, "null") or not isinstance(train, dict) or train.get("steps") is None:
        return
    if "train.steps" in texts:
        raise UserError(
            f"train.steps={texts['train.steps']}: must be null with train.tokens={tokens}, or the other way"
        )
    train["steps"] = None


def _as_given(line: str, read: list[ParsedOverride]) -> str:
    """A refusal of a value that stands on the command line shows it as it stands there: `1e3`, not 1000.0."""
    for name, _, text in ((*each.text.partition("="),) for each in read):
        shown = re.match(rf"{re.escape(name)}=(.+?): expected text(.*); as text: ", line)
        if shown and "${" not in text and not shown[1].startswith("'"):
            return f"{name}={text}: expected text{shown[2]}; as text: {override(name, text)}"
    return line


def _last_choices(read: list[ParsedOverride]) -> list[ParsedOverride]:
    """Without those that a later `group=null` takes back: Hydra knows no null there."""
    none = {each.name: i for i, each in enumerate(read) if each.name in groups() and each.parts.value() is None}
    return [each for i, each in enumerate(read) if i > none.get(each.name, -1)]


def _placed(model: dict[str, Any]) -> list[str]:
    """Makes a model one of Hydra's options, its positions one of theirs each, and chooses it: so that overrides of its
    keys, and other positions for its layers, find what they change. Returns the overrides that choose."""
    if not isinstance(model.get("blocks"), dict):
        raise UserError("model.blocks: must be blocks by their names")
    store, entries, blocks = ConfigStore.instance(), [], dict(model["blocks"])
    for name, block in blocks.items():
        if not isinstance(block, dict) or not isinstance(block.get("mixer"), dict | None):
            raise UserError(f"model.blocks.{name}: must be a block with a mixer, or null for none")
        for part in ("mixer", "beside"):
            mixer = block.get(part)
            if isinstance(mixer, dict) and isinstance(mixer.get("positions"), dict):
                store.store(group="positions", name=f"{_OTHER}_{name}_{part}", node=mixer["positions"])
                entries.append({f"/positions@blocks.{name}.{part}.positions": f"{_OTHER}_{name}_{part}"})
                rest = {key: value for key, value in mixer.items() if key != "positions"}
                blocks[name] = {**blocks[name], part: rest}
    store.store(group="model", name=_OTHER, node={"defaults": [*entries, "_self_"], **model, "blocks": blocks})
    return [f"model={_OTHER}"]


def _compose(read: list[ParsedOverride], model: dict[str, Any] | None) -> DictConfig:
    """Hydra's composition. A key that is not in the files is added where the constructor of its parent knows it."""
    base = [] if model is None else _placed(model)
    texts = [each.text for each in read]
    while True:
        try:
            return _hydra(base, texts, read)
        except (HydraException, OmegaConfBaseException) as error:
            refused = re.match(r"Could not override '([^']+)'", str(error))
            name = refused[1] if refused else None
            new = [i for i, each in enumerate(read) if each.name == name and texts[i] == each.text]
            new = [i for i in new if not read[i].parts.is_delete()]
            if not new or not all(read[i].adds or _is_known(read[i].name, read) for i in new):
                raise UserError(_one_line(error, read, model)) from None
            for i in new:
                texts[i] = ("++" if read[i].parts.package is None else "+") + texts[i]


def _hydra(base: list[str], texts: list[str], read: list[ParsedOverride]) -> DictConfig:
    """Returns what Hydra composes from `base` and `texts`, which are those of `read`, perhaps with a `+`.

    Hydra chooses options first and sets values in the result, so that a choice of options is composed once.
    """
    options = [_is_option(each.parts) for each in read]
    chosen = tuple(text for text, is_option in zip(texts, options, strict=True) if is_option)
    if base:  # the option of ConfigStore is another one at each call
        config = _chosen((*base, *chosen))
    else:
        config = copy.deepcopy(_chosen_before((*base, *chosen), files.stamp()))
    parser = OverridesParser.create()
    values = [text for text, is_option in zip(texts, options, strict=True) if not is_option]
    ConfigLoaderImpl._apply_overrides_to_config(parser.parse_overrides(values), config)
    return config


def _is_option(parts: Override) -> bool:
    """Says whether an override chooses an option of a group: all others set a value in what is chosen."""
    return parts.package is not None or parts.key_or_group in groups()


def _chosen(choices: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(choices))


@lru_cache(maxsize=64)
def _chosen_before(choices: tuple[str, ...], stamp: files.Stamp) -> DictConfig:
    return _chosen(choices)


def _read(given: str) -> ParsedOverride:
    """Understands one override and refuses what Hydra would misunderstand. Raises UserError."""
    plain = given.lstrip("+")
    if plain.startswith("-"):
        raise UserError(f"{given}: no such option; a run is described by key=value (farspan train --help)")
    if not re.match(r"~\w|\w[^=]*=", plain):
        raise UserError(f"{given}: expected key=value{nearest(plain.strip('~='), _tops())}")
    parts = _parsed(plain)
    key = parts.key_or_group
    if key.split(".")[0].split("/")[0] == "hydra":
        raise UserError(f"{given}: Hydra's own settings are not used here; the run's folder is run.dir")
    if parts.is_sweep_override():
        raise UserError(
            f"{given}: has several values: farspan sweep runs a job for each, and quotes make it one: "
            f"{override(key, plain.partition('=')[2])}"
        )
    if key in groups() or parts.package is not None or "/" in key:
        _check_option(given, parts)
    elif not plain.startswith("~") and not plain.partition("=")[2].strip():
        raise UserError(f"{given}: expected a value behind the =; null for none")
    return ParsedOverride(parts.input_line or plain, parts, given.startswith("+"))


def _parsed(given: str) -> Override:
    """Hydra's reading; text that it cannot read (other letters than ASCII, a second =) is taken as it stands."""
    key, equals, value = given.partition("=")
    is_text = equals and value and value[0] not in "'\"[{" and "${" not in value and "\\" not in value
    for text in [given, f"{key}={quote(value)}"] if is_text else [given]:
        try:
            return OverridesParser.create().parse_override(text)
        except (OverrideParseException, HydraException, ValueError):  # the last of a number of 5,000 digits
            continue
    if not key.isascii():
        raise UserError(f"{key.strip('~')}: no such key{_nearest_path(key.strip('~'))}")
    shown = given if len(given) <= 80 else f"{given[:77]}..."
    raise UserError(
        f"{shown}: not an override that can be read; expected key=value, text with blanks or = in quotes: "
        f"{override(key, value) if re.fullmatch(_KEY, key) and len(given) <= 200 else override('key', 'a = b')}"
    )


def _check_option(override: str, parts: Override) -> None:
    """Refuses an override of a group that does not name one of its options, or a place for it."""
    group, value = parts.key_or_group, parts.value()
    if group not in groups():
        known = groups() if parts.package is not None else [*groups(), *_paths()]
        dotted = group.replace("/", ".")
        near = f"; nearest: {dotted}" if dotted != group and dotted in known else nearest(dotted, known)
        raise UserError(f"{override.lstrip('+')}: {group} is no group{near}")
    optional = files.defaults().get(group) == "null" and parts.package is None
    options = [*groups()[group], *(["null"] if optional else [])]
    if parts.is_delete():
        if not optional and parts.package is None:
            raise UserError(f"{override}: a run needs one; accepts {', '.join(options)}")
        return
    if parts.package is None and group not in files.defaults():
        places = [name for name in files.written()[1] if name.startswith(f"{group}@")]
        raise UserError(f"{override}: where? for example {places[0] if places else f'{group}@PLACE'}={value}")
    if isinstance(value, list) and not optional:
        raise UserError(f"{override.lstrip('+')}: takes one option; accepts {', '.join(options)}")
    for name in value if isinstance(value, list) else [value]:
        name = "null" if name is None else str(name)
        if name not in options:
            close = get_close_matches(name, options, n=1, cutoff=0.3)
            near = f"; nearest: {close[0]}" if close else ""
            raise UserError(f"{override.lstrip('+')}: no such option; accepts {', '.join(options)}{near}")


def _is_known(key: str, read: list[ParsedOverride]) -> bool:
    """Says whether the constructor that a key belongs to has a parameter of that name."""
    parent, _, name = key.rpartition(".")
    node: Any = _written(read)
    constructor: Any = None
    for part in parent.split("."):
        node = node.get(part, {}) if isinstance(node, dict) else {}
        constructor = SECTIONS.get(part) if constructor is None else hints_of(constructor).get(part)
    given = {each.name: each.parts.value() for each in read}
    target = given.get(f"{parent}._target_") or (node.get("_target_") if isinstance(node, dict) else None)
    if isinstance(target, str) and (keys := choices.parameters(canonical(target))):  # an import may load torch
        return name in keys
    if target is not None:
        constructor = class_of(f"{parent}._target_", target)
    return isinstance(constructor, type) and name in parameters_of(constructor)[0]


def _one_line(error: Exception, read: list[ParsedOverride], model: dict[str, Any] | None = None) -> str:
    """Hydra's errors as one line with the nearest spelling. model: what the run starts from has, where that decides."""
    text = " ".join(str(error).split())
    if match := re.match(r"Could not override '([^']+)'", text):
        place = match[1].partition("@")[2]
        if place and model is not None and place.startswith("model."):
            return f"{match[1]}: the model is that of init_from, whose parts are what they are; its keys can be changed"
        if place:
            return f"{match[1]}: there is no such place{nearest(match[1], files.written()[1])}"
        return f"{match[1]}: {_linked(match[1], read) or f'no such key{_nearest_path(match[1], read, model)}'}"
    if match := re.match(r"Could not delete from config\. '([^']+)' does not exist", text):
        if match[1] in _paths(read):
            return f"~{match[1]}: is null already"
        return f"~{match[1]}: no such key{_nearest_path(match[1], read)}"
    if match := re.match(r"Could not delete from config\. The value of '([^']+)' is (.*) and not (.*)\.$", text):
        return f"~{match[1]}={match[3]}: its value is {match[2]}"
    if match := re.match(r"Could not delete '([^']+)'", text):
        return f"~{match[1]}: is not chosen, or not there"
    if match := re.match(r"Error merging override \+*(.+)$", text):
        cause = str(error.__cause__).splitlines()[0]
        return f"{match[1]}: {'expected a section with keys' if 'merge' in cause.lower() else cause}"
    return text[:300]


def _unresolved(error: OmegaConfBaseException, config: DictConfig) -> str:
    """The line for a `${...}` that leads nowhere: the key, what it says, why not."""
    why = str(error).splitlines()[0]
    key = error.full_key or ""
    node: Any = OmegaConf.to_container(config, resolve=False)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if match := re.match(r"Interpolation key '([^']+)' not found", why):
        paths = _paths_of(OmegaConf.to_container(config, resolve=False))
        near = nearest(match[1], paths)
        why = f"there is no {match[1]}{near if near.startswith('; nearest') else ''}"
    return f"{key}={node}: {re.sub(r'^[A-Za-z]+ raised while resolving interpolation: ', '', why)}"


def _linked(key: str, read: list[ParsedOverride]) -> str | None:
    """Returns what to say of a key below one that is a link to another."""
    node: Any = _written(read)
    for i, part in enumerate(key.split(".")):
        node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, str) and node.startswith("${"):
            link = ".".join(key.split(".")[: i + 1])
            return f"{link} is {node}, the same as another; change that one, or give {link} as a whole"
    return None


def _nearest_path(key: str, read: list[ParsedOverride] | None = None, model: dict[str, Any] | None = None) -> str:
    """The nearest full key, never the key itself; first of those that end alike: `lr` is optimizer.lr."""
    paths = _paths_of(_written(read) | ({} if model is None else {"model": model}))
    paths = [path for path in paths if path != key]
    last = key.rpartition(".")[2]
    alike = [path for path in paths if path.rpartition(".")[2] == last]
    if alike and len(alike) <= 3:
        return f"; nearest: {', '.join(alike)}"
    close = get_close_matches(
        key.lower(), [path.lower() for path in alike or paths], n=1, cutoff=0.6 if not alike else 0
    )
    by_lower = {path.lower(): path for path in paths}
    return f"; nearest: {by_lower[close[0]]}" if close else f"; accepts {', '.join(sorted(_tops()))}"


def _tops() -> list[str]:
    return sorted({*groups(), *SECTIONS, *SCALARS, *LISTS, *OBJECTS})


def _written(read: list[ParsedOverride] | None = None) -> dict[str, Any]:
    return files.written({each.name: str(each.parts.value()) for each in read or []})[0]


def _paths(read: list[ParsedOverride] | None = None) -> list[str]:
    return _paths_of(_written(read))


def _paths_of(node: Any, path: str = "") -> list[str]:
    """Every key of a tree, sections included."""
    below = [
        p
        for key, child in (node.items() if isinstance(node, dict) else ())
        if not key.startswith("_")
        for p in _paths_of(child, f"{path}.{key}" if path else str(key))
    ]
    return ([path] if path else []) + below
