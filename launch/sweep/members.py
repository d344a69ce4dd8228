"""The members of a sweep: every combination of the values that the overrides give, in the order of Hydra's own sweeper.

`key=a,b`, `choice(a,b)`, `range(1,4)` and, for a group, `glob(*)` are several values; `key=[a,b]` is one, a list.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, NamedTuple

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from launch.config.files import CONF, groups
from launch.errors import UserError
from train.run_config import RunConfig

MOST = 1000  # members
EXAMPLE = "optimizer.lr=1e-3,3e-3 seed=range(0,3)"
_OWN = ("run.dir", "run.name", "resume")  # a sweep gives them to its members
_NAME_LENGTH = 80  # characters of a member's folder


@dataclass
class Swept:
    """A key with several values. key: as it is given. label: the shortest end of it that names nothing else."""

    key: str
    values: list[str]
    label: str = ""

    @property
    def path(self) -> str:
        """The place in the configuration that it decides: of `mixer@model.blocks.gla.mixer`, what follows the @."""
        group, _, package = self.key.lstrip("+").partition("@")
        return package.rpartition(":")[2] if package and package[0] != "_" else group.replace("/", ".")

    @property
    def numbers(self) -> list[float] | None:
        """The values as numbers, or None where one is not."""
        try:
            numbers = [float(value) for value in self.values]
        except ValueError:
            return None
        return numbers if all(math.isfinite(number) for number in numbers) else None


@dataclass
class Member:
    """One run of a sweep. overrides: all of them. values: of each swept key. folder: its name in the sweep's folder.

    state: waiting, running, done, stopped or failed, and then the reason. job, address: the last one on a cluster.
    """

    number: int
    overrides: list[str]
    values: dict[str, str]
    folder: str = ""
    state: str = "waiting"
    reason: str | None = None
    job: str | None = None
    address: str | None = None

    @property
    def words(self) -> str:
        """The words that set the member apart, as given."""
        return " ".join(f"{key}={value}" for key, value in self.values.items())


def expand(overrides: list[str]) -> tuple[list[Swept], list[Member]]:
    """The swept keys and the members, not named yet. Raises UserError for what cannot be read, or is no sweep."""
    choices: dict[str, list[str]] = {}
    swept: dict[str, Swept] = {}
    loader = _loader()
    for override in overrides:
        parts = _parsed(override, loader)
        key = parts.get_key_element()
        swept.pop(key, None)  # as everywhere, the last one counts
        if parts.is_sweep_override():
            values = _values(override, parts)
            swept[key] = Swept(key, values)
            choices[key] = [f"{key}={value}" for value in values]
        elif parts.is_delete():
            choices[key] = [override]
        else:
            choices[key] = [f"{key}={parts.get_value_element_as_str()}"]
    if not swept:
        raise UserError(f"nothing to sweep: give a key several values, for example {EXAMPLE}")
    keys = [swept[key] for key in choices if key in swept]
    count = math.prod(len(each.values) for each in keys)
    if count > MOST:
        sizes = " x ".join(f"{len(each.values):,} of {each.key}" for each in keys)
        raise UserError(f"{count:,} members ({sizes}): a sweep has {MOST:,} at most")
    members = []
    for number, chosen in enumerate(product(*choices.values()), start=1):
        given = dict(zip(choices, chosen, strict=True))
        own = {each.key: given[each.key].removeprefix(f"{each.key}=") for each in keys}
        members.append(Member(number, list(chosen), own))
    return keys, members


def name(swept: list[Swept], members: list[Member], config: dict[str, Any]) -> None:
    """Labels the keys by a member's configuration, and names the folders: `3-lr=0.003-gla.mixer=gated_deltanet`."""
    paths = {*_paths(config), *(each.path for each in swept)}
    for each in swept:
        parts = each.path.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        each.label = next(end for end in ends if end == each.path or _names_one(end, paths))
    for member in members:
        words = [f"{each.label}={_safe(member.values[each.key])}" for each in swept]
        member.folder = "-".join([str(member.number), *words])[:_NAME_LENGTH].rstrip("-.=")


def plain(value: str) -> str:
    """A value without the quotes and backslashes that Hydra needs."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else re.sub(r"\\(.)", r"\1", value)


def _safe(value: str) -> str:
    """A value as a part of a folder's name that neither a shell nor an override would read as something else."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", plain(value)).strip("_") or "_"


def _names_one(end: str, paths: set[str]) -> bool:
    return sum(path == end or path.endswith(f".{end}") for path in paths) == 1


def _paths(node: Any, path: str = "") -> list[str]:
    """Every key of a configuration, sections included."""
    below = node.items() if isinstance(node, dict) else ()
    return ([path] if path else []) + [p for key, child in below for p in _paths(child, f"{path}.{key}".lstrip("."))]


def _loader() -> ConfigLoader:
    """The loader that knows the options of a group, for glob(*)."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return GlobalHydra.instance().config_loader()


def _parsed(override: str, loader: ConfigLoader) -> Override:
    """Hydra's reading of an override. Text with a second = is taken as it stands, as in `farspan train`."""
    if override.startswith("-"):
        raise UserError(f"{override}: no such option; a sweep is described by key=value (farspan sweep --help)")
    key, equals, value = override.partition("=")
    parser = OverridesParser.create(config_loader=loader)
    is_text = equals and value and not set(value) & set("'\"\\,()[]{}$")
    for text in [override, f"{key}='{value}'"] if is_text else [override]:
        try:
            return parser.parse_overrides([text])[0]
        except HydraException:
            continue
    raise UserError(f"{override}: not an override that a sweep can read; expected key=value, or as in {EXAMPLE}")


def _values(override: str, parts: Override) -> list[str]:
    """The values of a swept key, as Hydra writes them. Raises UserError where they cannot be listed."""
    key = parts.key_or_group
    if key in _OWN:
        raise UserError(f"{override}: the members of a sweep have their own; give other keys several values")
    if parts.value_type == ValueType.INTERVAL_SWEEP:
        raise UserError(f"{override}: a continuous range has no list of values; give some, or range(START,STOP,STEP)")
    if parts.value_type == ValueType.GLOB_CHOICE_SWEEP and key not in groups():
        raise UserError(f"{override}: {key} is no group, glob takes the options of one; accepts {', '.join(groups())}")
    try:
        values = list(islice(parts.sweep_string_iterator(), MOST + 1))
    except (HydraException, ValueError, ArithmeticError) as error:
        raise UserError(f"{override}: cannot be listed: {' '.join(str(error).split())}") from None
    if not values:
        known = f"; {key} has {', '.join(groups()[key])}" if key in groups() else ""
        raise UserError(f"{override}: no value at all{known}")
    if len(values) > MOST:
        raise UserError(f"{override}: more than {MOST:,} values: a sweep has {MOST:,} members at most")
    return values


class CheckedMember(NamedTuple):
    """A checked member. elsewhere: the overrides that resume it where only the cluster sees its folder."""

    member: Member
    config: RunConfig
    device: str
    elsewhere: list[str] | None = None
