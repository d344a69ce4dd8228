"""What an architecture is: a name, a config.json read and written, and the rows of its tensors."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from models.hub.rows import Entries

Config = dict[str, Any]
Node = dict[str, Any]
GIVEN = ("dim", "slot", "depth")  # what the model itself gives its parts


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One class of `transformers`.

    name, kind: its `architectures` and `model_type`. mixers: the `_target_`s that its layers may have. defaults: what a
    config.json that does not name a key means by it. fixed: keys that must have one value. body: a complete config.json
    to our `model` section. express: the other way, but for what is fixed. entries: of a complete config.json, the rows
    of our parameters. suits: whether a `model` section, its mixers' targets given, would be this one. aliases: other
    names of keys. left_out: beginnings and endings of tensors' names that a folder may hold and no model of ours reads.

    `body` and `express` raise ValueError, a line that begins with the key.
    """

    name: str
    kind: str
    mixers: frozenset[str]
    defaults: Config
    fixed: Config
    body: Callable[[Config], Node]
    express: Callable[[Node], Config]
    entries: Callable[[Config], Entries]
    suits: Callable[[Node, set[str]], bool]
    aliases: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def complete(self, config: Config) -> Config:
        """The same config.json under the names that we read, with what it leaves out. Raises ValueError."""
        renamed = {self.aliases.get(key, key): value for key, value in config.items()}
        full = self.defaults | self.fixed | {key: value for key, value in renamed.items()}
        for key, value in self.fixed.items():
            if full[key] != value:
                raise ValueError(f"config.json: {key}={shown(full[key])}: must be {shown(value)}")
        missing = [key for key, value in full.items() if value is REQUIRED]
        if missing:
            raise ValueError(f"config.json: {missing[0]}: missing")
        return full

    def read(self, config: Config) -> Node:
        """Our `model` section of a config.json. Raises ValueError."""
        return self.body(self.complete(config))

    def write(self, model: Node) -> Config:
        """The config.json of a `model` section. Raises ValueError for what stands in the way."""
        return {"architectures": [self.name], "model_type": self.kind, **self.fixed, **self.express(model)}

    def rows(self, config: Config) -> Entries:
        """Of a config.json, the rows of every parameter of ours."""
        return self.entries(self.complete(config))


REQUIRED = object()  # in `defaults`: a key that has none


def target(kind: type) -> str:
    """A class as `_target_` names it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def node(kind: type[nn.Module] | type, *, partial: bool = True, **values: Any) -> Node:
    """A section that builds a `kind` with these values, every other key there with its default."""
    asked = inspect.signature(kind).parameters
    rest = {n: p.default for n, p in asked.items() if n not in GIVEN and p.default is not inspect.Parameter.empty}
    head: Node = {"_target_": target(kind)} | ({"_partial_": True} if partial else {})
    return head | rest | values


def fold(kinds: list[str]) -> list[str]:
    """The shortest pattern that, repeated, names these layers."""
    for length in range(1, len(kinds) + 1):
        if all(kind == kinds[i % length] for i, kind in enumerate(kinds)):
            return kinds[:length]
    return kinds


def layers(model: Node) -> list[tuple[str, Node]]:
    """The name and the section of each layer's block, the dense first ones with their feed-forward."""
    names = [model["pattern"][i % len(model["pattern"])] for i in range(model["layers"])]
    found = [(name, model["blocks"][name]) for name in names]
    front = model.get("first_k_dense") or 0
    return [(n, {**b, "ffn": model["dense"]} if i < front else b) for i, (n, b) in enumerate(found)]


def told(section: Node, kind: type) -> Node:
    """A section's values, with the constructor's defaults for what it leaves out."""
    return node(kind) | section


def must(path: str, section: Node, wanted: Mapping[str, Any], who: str) -> None:
    """Raises ValueError for the first key of a section that has another value than `who` needs."""
    for key, value in wanted.items():
        if section[key] != value:
            raise ValueError(f"{path}.{key}={shown(section[key])}: must be {shown(value)}, as in {who}")


def one(found: Iterable[tuple[str, Any]], who: str) -> Any:
    """The value that all (path, value) have. Raises ValueError for the first that has another."""
    first = None
    for path, value in found:
        if first is None:
            first = (path, value)
        elif value != first[1]:
            raise ValueError(
                f"{path}={shown(value)}: must be {shown(first[1])} as {first[0]}: {who} has one for all layers"
            )
    return None if first is None else first[1]


def ratio(width: int, dim: int) -> float:
    """r with int(dim * r) == width, which a rounded quotient may miss by one."""
    found = width / dim
    return found if int(dim * found) == width else math.nextafter(found, math.inf)


def shown(value: Any) -> str:
    """A value as it is written in YAML and JSON."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
