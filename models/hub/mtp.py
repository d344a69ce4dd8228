"""Published modules of multi-token prediction: the place of their tensors, and the kind of their layer.

Every family builds a module as `models.mtp` has it, and its layer as one of the model's own. So a table names what lies
around that layer, and what a config.json would say of a model of that layer alone: sections and rows come from there.

Legend: D model width.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.hub.rows import PLAIN, Entries, Form, ParameterSource, whole

Config = dict[str, Any]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
JOIN = "join"


@dataclass(frozen=True, kw_only=True)
class PublishedMTP:
    """key: of config.json, the number of modules. most: that a family can have, null for any. place: the beginning of
    the names of module k's tensors, of a complete config.json. names: of our norms and our projection, theirs. block:
    of the layer's tensors, behind the place. layer: keys of a config.json that has no other layer than the module's.
    form: of the three norms. copies: tensors that repeat one of the model's, as `names`. fixed: keys that must have one
    value where there are modules."""

    key: str
    most: int | None = None
    place: Callable[[Config, int], str]
    names: Mapping[str, str]
    block: str = ""
    layer: Config
    form: Form = PLAIN
    copies: Mapping[str, str] = field(default_factory=dict)
    fixed: Config = field(default_factory=dict)

    def alone(self, config: Config) -> Config:
        """A complete config.json of the module's layer and no other."""
        return config | {"num_hidden_layers": 1} | self.layer

    def places(self, config: Config, stored: Container[str]) -> list[str]:
        """Finds the modules among a folder's tensors, by their projections: where each lies."""
        found = list[str]()
        while len(found) < (self.most or 1024):
            place = self.place(config, len(found))
            if f"{place}.{self.names[JOIN]}.weight" not in stored:
                break
            found.append(place)
        return found

    def rows(self, alone: Entries, config: Config, k: int) -> Entries:
        """The rows of module k. alone: those of the model of its layer alone."""
        ours, theirs, D = f"mtp.{k}", self.place(config, k), config["hidden_size"]
        rows = {
            f"{ours}.{name}.weight": whole(f"{theirs}.{own}.weight", D, PLAIN if name == JOIN else self.form)
            for name, own in self.names.items()
        }
        layer, moved = "model.layers.0", f"{theirs}{self.block}"
        for name, (pieces, form) in alone.items():
            if name.startswith("layers.0."):
                there = tuple(piece._replace(source=piece.source.replace(layer, moved, 1)) for piece in pieces)
                rows[f"{ours}.block.{name.removeprefix('layers.0.')}"] = ParameterSource(there, form)
        return rows

    def repeated(self, config: Config, modules: int) -> dict[str, str]:
        """The tensors that modules may hold once more, to the names of those that they repeat."""
        tied = config["tie_word_embeddings"]
        return {
            f"{self.place(config, k)}.{name}": EMBEDDING if tied and source == HEAD else source
            for k in range(modules)
            for name, source in self.copies.items()
        }


def behind_the_layers(layer: Config) -> PublishedMTP:
    """Modules that count on the layers, as DeepSeek-V3 numbers them."""
    return PublishedMTP(
        key="num_nextn_predict_layers",
        place=lambda config, k: f"model.layers.{config['num_hidden_layers'] + k}",
        names={"embedding_norm": "enorm", "hidden_norm": "hnorm", JOIN: "eh_proj", "norm": "shared_head.norm"},
        layer=layer,
        copies={"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": HEAD},
    )


def beside_the_model(key: str, layer: Config, form: Form, **values: Any) -> PublishedMTP:
    """The one module of Qwen's, whose projection and norms several layers would share."""
    names = {"embedding_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden", JOIN: "fc", "norm": "norm"}
    where: dict[str, Any] = {"place": lambda config, k: "mtp", "block": ".layers.0"}
    return PublishedMTP(key=key, most=1, names=names, layer=layer, form=form, **where, **values)
