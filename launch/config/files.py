"""conf/ read as plain YAML: its groups, its keys and the values they have there, as they are written.

`--help`, the shell's completion and the reference need no more than that, and Hydra takes half a second to import. A
test holds `written` against what Hydra composes.
"""

import copy
import os
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

CONF = Path(__file__).resolve().parents[2] / "conf"
Stamp = tuple[tuple[str, int, int], ...]
OVERRIDE = "override "  # opens an entry that chooses for one placed further down


def stamp() -> Stamp:
    """When each file of conf/ last changed, and its size: another value where one is edited, added or removed."""
    with os.scandir(CONF) as entries:
        folders = [entry.path for entry in entries if entry.is_dir()]
    stamps = []
    for folder in (str(CONF), *folders):
        with os.scandir(folder) as entries:
            stamps += [(entry.path, *_version(entry.stat())) for entry in entries if entry.name.endswith(".yaml")]
    return tuple(sorted(stamps))


def groups() -> dict[str, list[str]]:
    """Each configuration group and its options."""
    return {group: list(options) for group, options in _groups(stamp()).items()}


@lru_cache(maxsize=1)
def _groups(now: Stamp) -> dict[str, list[str]]:
    return {
        folder.name: sorted(p.stem for p in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and any(folder.glob("*.yaml"))
    }


def option(group: str, name: str) -> dict[str, Any]:
    """One file of conf/, its scalars as text: `3e-3`, `720_000`, `null`."""
    return _load(CONF / group / f"{name}.yaml")


def defaults() -> dict[str, str]:
    """The option of each group in the default job, in the order of conf/train.yaml; `null` for none."""
    entries = _load(CONF / "train.yaml")["defaults"]
    return {key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}


def written(choices: dict[str, str] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration under `choices` of options, not resolved, and the option of every group placed in it.

    A group placed inside another is named as in an override: `mixer@model.blocks.gla.mixer`.
    """
    return copy.deepcopy(_written(frozenset((choices or {}).items()), stamp()))


@lru_cache(maxsize=32)
def _written(given: frozenset[tuple[str, str]], now: Stamp) -> tuple[dict[str, Any], dict[str, str]]:
    """The same, once for each state of the files: to look at them all takes as long as to read one."""
    choices, options = dict(given), _groups(now)
    placed: dict[str, str] = {}
    tree: dict[str, Any] = {}
    if (experiment := choices.get("experiment", "null")) in options[
        "experiment"
    ]:  # the last one placed, the first heard
        for key, chosen in _overriding(option("experiment", experiment).get("defaults", []), "").items():
            choices.setdefault(key, chosen)

    def add(node: dict[str, Any], own: str, package: str) -> None:
        entries = node.get("defaults", [])
        for key, chosen in _overriding(entries, package).items():
            choices.setdefault(key, chosen)
        entries = [entry for entry in entries if not str(next(iter(entry))).startswith(OVERRIDE)]
        for entry in entries if "_self_" in entries else [*entries, "_self_"]:
            if entry == "_self_":
                own_keys = {key: value for key, value in node.items() if key != "defaults"}
                place = _at(tree, package)
                _merge(place, own_keys)
                if package:  # in the order of its file, whatever was placed inside before
                    ordered = {key: place[key] for key in [*own_keys, *place]}
                    place.clear()
                    place.update(ordered)
            elif isinstance(entry, str):  # another option of the same group
                add(option(own, entry), own, package)
            else:
                ((name, chosen),) = entry.items()
                group, where, key = _place(name, package)
                placed[key] = choices.get(key, chosen)
                if placed[key] in options.get(group, []):
                    add(option(group, placed[key]), group, "" if _is_global(group, placed[key]) else where)

    add(_load(CONF / "train.yaml"), "", "")
    return tree, placed


def _place(name: str, package: str) -> tuple[str, str, str]:
    """The group of an entry in a defaults list, the node where it is placed, and the two as in an override."""
    group, _, inner = name.removeprefix("/").partition("@")
    where = ".".join(filter(None, [package, inner])) if inner else group
    return group, where, group if where == group else f"{group}@{where}"


def _overriding(entries: list[Any], package: str) -> dict[str, str]:
    """Returns what a defaults list chooses for the groups that its other entries place, by their names as in an
    override."""
    chosen = {name: option for entry in entries if isinstance(entry, dict) for name, option in entry.items()}
    overrides = {name.removeprefix(OVERRIDE): option for name, option in chosen.items() if name.startswith(OVERRIDE)}
    return {_place(name, package)[2]: option for name, option in overrides.items()}


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Every full key below `node` and its value; a list is a value."""
    if not isinstance(node, dict) or path and not node:
        return {path: node}
    return {k: v for key, child in node.items() for k, v in leaves(child, f"{path}.{key}" if path else key).items()}


def flow(value: Any) -> str:
    """A value as it is given on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(child)}" for key, child in value.items()) + "}"
    return f"[{', '.join(map(flow, value))}]" if isinstance(value, list) else str(value)


def head_comment(path: Path) -> str:
    """Returns what a YAML file's opening comment says of it, without Hydra's directives."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def comments(path: Path) -> dict[str, str]:
    """Returns what stands behind the `#` of a key's line, by the key's full name within the file."""
    lines: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)([\w@/.]+):(?: .*?)??(?: # ?(.*))?$", line)
        if match is None:
            continue
        above = [(indent, key) for indent, key in above if indent < len(match[1])] + [(len(match[1]), match[2])]
        if match[3]:
            lines[".".join(key for _, key in above)] = match[3].strip()
    return lines


def _is_global(group: str, name: str) -> bool:
    return (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").startswith("# @package _global_")


def _load(path: Path) -> dict[str, Any]:
    return copy.deepcopy(_parsed(path, _version(path.stat())))


def _version(text: os.stat_result) -> tuple[int, int]:
    return text.st_mtime_ns, text.st_size


@cache
def _parsed(path: Path, version: tuple[int, int]) -> dict[str, Any]:
    import yaml

    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CBaseLoader", yaml.BaseLoader)) or {}


def _at(tree: dict[str, Any], package: str) -> dict[str, Any]:
    for key in filter(None, package.split(".")):
        tree = tree.setdefault(key, {})
    return tree


def _merge(into: dict[str, Any], node: dict[str, Any]) -> None:
    for key, value in node.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
