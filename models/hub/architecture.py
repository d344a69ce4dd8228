"""A published architecture: a name, a config.json read and written, and the rows of its tensors."""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from models.hub.mtp import PublishedMTP
from models.hub.rows import Entries, PublishedTensors
from models.hub.tensors import StoredTensor
from models.hub.values import USUAL, Kind, check, optional, shown
from models.hub.values import whole as count

Config = dict[str, Any]
Node = dict[str, Any]
GIVEN = ("dim", "slot", "depth")  # what the model itself gives its parts


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One class of `transformers`.

    name, kind: its `architectures` and `model_type`. other_kinds: types of models that are of this class, too. about:
    the parts of it that are here, for people. mixers: the `_target_`s that its layers may have. defaults: what a
    config.json that does not name a key means by it. kinds: what its keys may be, beside those of `values.USUAL`.
    fixed: keys that must have one value. fits: raises ValueError for values that are no model together, in the words of
    config.json. body: a complete config.json to our `model` section. express: the other way, but for what is fixed.
    entries: of a complete config.json, the rows of our parameters. suits: whether a `model` section, its mixers'
    targets given, would be this one. aliases: other names of keys. left_out: beginnings and endings of tensors' names
    that a folder may hold and no model of ours reads. unstacked: tensors that a folder may hold as one, by the names of
    the tables. stacked: those that an export writes as one, of those of the tables. settled: a config.json with what
    follows from older keys. beyond: keys of the model and of its blocks that it can say and that others have at one
    value. mtp: its modules of multi-token prediction, null where none are known here.

    All are held to the class of `transformers`, the reader: what that has not is refused, by its key, in both
    directions. `fits`, `body` and `express` raise ValueError, a line that begins with the key.
    """

    name: str
    kind: str
    about: str
    mixers: frozenset[str]
    defaults: Config
    fixed: Config
    kinds: dict[str, Kind]
    fits: Callable[[Config], None]
    body: Callable[[Config], Node]
    express: Callable[[Node], Config]
    entries: Callable[[Config], Entries]
    suits: Callable[[Node, set[str]], bool]
    aliases: Mapping[str, str] = field(default_factory=dict)
    other_kinds: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    unstacked: Callable[[dict[str, StoredTensor]], dict[str, StoredTensor]] = dict
    stacked: Callable[[PublishedTensors], PublishedTensors] = dict
    settled: Callable[[Config], Config] = dict
    beyond: frozenset[str] = frozenset()
    mtp: PublishedMTP | None = None

    @property
    def told(self) -> str:
        """The parts that are here, modules of multi-token prediction among them, for people."""
        if self.mtp is not None:
            return f"{self.about}; {'its MTP module' if self.mtp.most == 1 else 'MTP modules'} in and out"
        return f"{self.about}; MTP left out" if any("mtp" in each for each in self.left_out) else self.about

    def complete(self, config: Config) -> Config:
        """The same config.json under the names that we read, with what it leaves out. Raises ValueError."""
        renamed = {self.aliases.get(key, key): value for key, value in config.items()}
        renamed = self.settled(renamed)
        kind = renamed.get("model_type", self.kind)
        if kind not in (self.kind, *self.other_kinds):  # which a reader goes by
            raise ValueError(f"config.json: model_type={shown(kind)}: must be {self.kind}, that of {self.name}")
        if renamed.get("quantization_config") is not None:
            raise ValueError("config.json: quantization_config: must be absent: no quantised weights are read")
        if renamed.get("hidden_act") == "swish":  # another name of the same
            renamed["hidden_act"] = "silu"
        ahead: dict[str, Kind] = {} if self.mtp is None else {self.mtp.key: optional(count(0))}
        full = dict.fromkeys(ahead) | self.defaults | self.fixed | renamed
        for key, value in self.fixed.items():
            if full[key] != value:
                raise ValueError(f"config.json: {key}={shown(full[key])}: must be {shown(value)}")
        missing = [key for key, value in full.items() if value is REQUIRED]
        if missing:
            raise ValueError(f"config.json: {missing[0]}: missing")
        check(full, USUAL | self.kinds | ahead)
        self.fits(full)
        return full

    def bounded(self, config: Config, stored: Mapping[str, StoredTensor]) -> None:
        """Raises ValueError for sizes that no model of these tensors has, before anything is made in them."""
        full = self.complete(config)
        if full["num_hidden_layers"] > len(stored):
            layers = full["num_hidden_layers"]
            raise ValueError(
                f"config.json: num_hidden_layers={layers}: must be at most {len(stored)}, the tensors here"
            )
        largest = max([LARGE, *(size for each in stored.values() for size in each.shape)])
        for key in sorted((USUAL | self.kinds).keys() & full.keys() - UNBOUNDED):
            if type(full[key]) is int and full[key] > largest:
                raise ValueError(f"config.json: {key}={full[key]}: must be at most {largest}, the largest size here")

    def read(self, config: Config) -> Node:
        """Our `model` section of a config.json. Raises ValueError."""
        full = self.complete(config)
        model, modules = self.body(full), self._modules(full)
        if not modules:
            return model
        name, section = self._layer_ahead(full)
        return {**model, "blocks": {name: section} | model["blocks"], "mtp_layers": modules, "mtp_block": name}

    def _modules(self, full: Config) -> int:
        return 0 if self.mtp is None else full[self.mtp.key] or 0

    def _layer_ahead(self, full: Config) -> tuple[str, Node]:
        """The name and the section of the layer of MTP modules."""
        assert self.mtp is not None
        alone = self.body(self.mtp.alone(full))
        return alone["pattern"][0], alone["blocks"][alone["pattern"][0]]

    def held(self, config: Config, stored: Collection[str], *, mtp: bool = True) -> tuple[Config, tuple[str, ...]]:
        """The same config.json with the number of MTP modules that a folder of these tensors holds, none unless `mtp`;
        and the beginnings of tensors' names that are then left out. Raises ValueError for modules that are none of
        ours."""
        if self.mtp is None:
            return config, ()
        full, key = self.complete(config), self.mtp.key
        places, wanted = self.mtp.places(full, stored), {**self.mtp.fixed}
        if not mtp:
            return {**config, key: 0}, tuple(f"{place}." for place in places)
        if places and full[key] is not None:
            wanted[key] = len(places)
        for name, value in wanted.items() if places else ():
            if full.get(name, value) != value:
                raise ValueError(
                    f"config.json: {name}={shown(full[name])}: must be {shown(value)} for the MTP modules at "
                    f"{places[0]}; `farspan import` with mtp=false leaves them out"
                )
        others = {each: value for each, value in config.items() if self.aliases.get(each, each) != key}
        return {**others, key: len(places)}, ()

    def repeated(self, config: Config) -> dict[str, str]:
        """Tensors that repeat others, which a folder may hold: their names to those of the others."""
        full = self.complete(config)
        return {} if self.mtp is None else self.mtp.repeated(full, self._modules(full))

    def with_modules(self, config: Config, model: Node) -> Config:
        """The config.json of a `model` section that has MTP modules, of its config.json without. Raises ValueError."""
        modules = model["mtp_layers"]
        key, kind = f"model.mtp_layers={modules}", model.get("mtp_block") or layers(model)[-1][0]
        if self.mtp is None:
            raise ValueError(f"{key}: must be 0 for {self.name}, of which no modules are known here")
        if modules > (self.mtp.most or modules):
            raise ValueError(f"{key}: must be at most {self.mtp.most}, as in {self.name}")
        if model.get("tied") and model.get("tied_scale") != 1:
            raise ValueError(
                f"model.tied_scale={shown(model.get('tied_scale'))}: must be 1 with modules of {self.name}"
            )
        alone = {**model, "layers": 1, "pattern": [kind], "first_k_dense": 0, "dense": None, "mtp_layers": 0}
        if not self.suits(alone, {mixed(model["blocks"][kind])["mixer"]["_target_"]}):
            raise ValueError(f"model.mtp_block={kind}: must be a layer that {self.name} has")
        found, wanted = self.read(self.write(alone)), self._layer_ahead(self.complete(config))[1]
        if differing := _differing(found["blocks"][found["pattern"][0]], wanted):
            path, value, other = differing
            raise ValueError(
                f"model.blocks.{kind}{path}={shown(value)}: must be {shown(other)}, as in {self.name}'s MTP"
            )
        return {**config, self.mtp.key: modules}

    def write(self, model: Node) -> Config:
        """The config.json of a `model` section. Raises ValueError for what stands in the way."""
        must("model", PLAIN_MODEL | model, without(PLAIN_MODEL, self.beyond), self.name)
        for name, block in layers(model):
            must(f"model.blocks.{name}", PLAIN_BLOCK | block, without(PLAIN_BLOCK, self.beyond), self.name)
        config = {"architectures": [self.name], "model_type": self.kind, **self.fixed, **self.express(model)}
        self.read(config)  # what is written here is read here, too
        return config

    def rows(self, config: Config) -> Entries:
        """Returns the published rows of every parameter of ours, from a config.json."""
        full = self.complete(config)
        rows = self.entries(full)
        if modules := self._modules(full):
            assert self.mtp is not None
            alone = self.entries(self.mtp.alone(full))
            rows |= {n: each for k in range(modules) for n, each in self.mtp.rows(alone, full, k).items()}
        return rows


NO_MIXER = "null"
PLAIN_MODEL: Config = {"logit_softcap": None, "norm": "rms", "attnres_block": None, "hyper_connections": None}
PLAIN_BLOCK: Config = {
    **{"beside": None, "norm": "rms", "residual": "input"},
    **{"mixer_residual_scale": 1.0, "ffn_residual_scale": 1.0},
}
REQUIRED = object()  # in `defaults`: a key that has none
LARGE = 65_536  # a size up to which anything is made at once
UNBOUNDED = {  # whole numbers that no tensor has for a size
    *("max_position_embeddings", "original_max_position_embeddings", "num_hidden_layers", "sliding_window"),
    *("decoder_sparse_step", "full_attention_interval", "rope_theta"),
    *("max_window_layers", "no_rope_layer_interval"),
}


def target(kind: type) -> str:
    """A class as `_target_` names it: by the outermost package that hands it on, else by its own module."""
    parts = kind.__module__.split(".")
    for length in range(1, len(parts)):
        package = import_module(".".join(parts[:length]))
        if getattr(package, kind.__name__, None) is kind:
            return f"{package.__name__}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def node(kind: type[nn.Module] | type, *, partial: bool = True, **values: Any) -> Node:
    """A section that builds a `kind` with these values, every other key there with its default."""
    parameters = inspect.signature(kind).parameters
    rest = {n: p.default for n, p in parameters.items() if n not in GIVEN and p.default is not inspect.Parameter.empty}
    head: Node = {"_target_": target(kind)} | ({"_partial_": True} if partial else {})
    return head | rest | values


def fold(kinds: list[str]) -> list[str]:
    """The shortest pattern that, repeated, names these layers."""
    for length in range(1, len(kinds) + 1):
        if all(kind == kinds[i % length] for i, kind in enumerate(kinds)):
            return kinds[:length]
    return kinds


def mixed(block: Node) -> Node:
    """The same block, with a section that builds nothing for a mixer that is null."""
    return {**block, "mixer": {"_target_": NO_MIXER}} if block["mixer"] is None else block


def layers(model: Node) -> list[tuple[str, Node]]:
    """The name and the section of each layer's block, the dense first ones with their feed-forward. A layer without a
    mixer has one whose `_target_` is `NO_MIXER`."""
    names = [model["pattern"][i % len(model["pattern"])] for i in range(model["layers"])]
    blocks = [(name, mixed(model["blocks"][name])) for name in names]
    front = model.get("first_k_dense") or 0
    return [(n, {**b, "ffn": model["dense"]} if i < front else b) for i, (n, b) in enumerate(blocks)]


def with_defaults(section: Node, kind: type) -> Node:
    """A section's values, with the constructor's defaults for what it leaves out."""
    return node(kind) | section


def without(values: Config, keys: frozenset[str]) -> Config:
    return {key: value for key, value in values.items() if key not in keys}


def must(path: str, section: Node, wanted: Mapping[str, Any], who: str) -> None:
    """Raises ValueError for the first key of a section that has another value than `who` needs."""
    for key, value in wanted.items():
        if section[key] != value:
            raise ValueError(f"{path}.{key}={shown(section[key])}: must be {shown(value)}, as in {who}")


def one(values: Iterable[tuple[str, Any]], who: str) -> Any:
    """The value that all (path, value) have. Raises ValueError for the first that has another."""
    first = None
    for path, value in values:
        if first is None:
            first = (path, value)
        elif value != first[1]:
            raise ValueError(
                f"{path}={shown(value)}: must be {shown(first[1])} as {first[0]}: {who} has one for all layers"
            )
    return None if first is None else first[1]


def _differing(one: Any, other: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two sections differ, and both values; None for none."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return None if one == other else (path, one, other)
    keys = (key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    first = min(keys, default=None)
    return None if first is None else _differing(one.get(first), other.get(first), f"{path}.{first}")


def ratio(width: int, dim: int) -> float:
    """r with int(dim * r) == width, which a rounded quotient may miss by one."""
    ratio_found = width / dim
    return ratio_found if int(dim * ratio_found) == width else math.nextafter(ratio_found, math.inf)
