"""Granite 3: Llama with four multipliers, which an import takes into the weights and an export leaves at 1.

Legend: K head width.
"""

import math

from models.hub import layers as parts
from models.hub.architecture import Architecture, Config, Node
from models.hub.bamba import times
from models.hub.llama import LLAMA
from models.hub.rows import Entries
from models.hub.values import ABOVE_ZERO, Kind

NAME = "GraniteForCausalLM"
MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
KINDS: dict[str, Kind] = dict.fromkeys(MULTIPLIERS, ABOVE_ZERO)


def folded(config: Config, section: Node) -> Node:
    """The `model` section of these multipliers: a tied head undoes that of the embedding."""
    if not section["tied"]:
        return section
    scale = 1 / (config["embedding_multiplier"] * config["logits_scaling"])
    return section | {"tied_scale": 1.0 if math.isclose(scale, 1, rel_tol=1e-12) else scale}


def folded_ends(config: Config, rows: Entries) -> Entries:
    """Embedding and head, times their multipliers."""
    rows = times(rows, "embedding", config["embedding_multiplier"])
    return times(rows, "head.weight", 1 / config["logits_scaling"]) if "head.weight" in rows else rows


def folded_attention(ours: str, config: Config, rows: Entries) -> Entries:
    """A layer's attention, times its multipliers: scores are scaled by K^-½ here."""
    K = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    rows = times(rows, f"{ours}.q.weight", config["attention_multiplier"] * math.sqrt(K))
    return times(rows, f"{ours}.out.weight", config["residual_multiplier"])


def ones(keys: Config) -> Config:
    """The multipliers of a model of ours, whose weights have them."""
    return dict.fromkeys(MULTIPLIERS, 1.0) | {"attention_multiplier": keys["head_dim"] ** -0.5}


def _entries(config: Config) -> Entries:
    rows = folded_ends(config, LLAMA.entries(config))
    for i in range(config["num_hidden_layers"]):
        rows = folded_attention(f"layers.{i}.mixer", config, rows)
        rows = times(rows, f"layers.{i}.ffn.down.weight", config["residual_multiplier"])
    return rows


def _express(model: Node) -> Config:
    keys = LLAMA.express(model)
    return keys | ones(keys)


GRANITE = Architecture(
    name=NAME,
    kind="granite",
    about="as Llama, with four multipliers, which the weights take in: they come out at 1",
    mixers=frozenset({parts.ATTENTION}),
    defaults=LLAMA.defaults | dict.fromkeys(MULTIPLIERS, 1.0),
    fixed=LLAMA.fixed,
    kinds=parts.HEADS | KINDS,
    fits=LLAMA.fits,
    body=lambda config: folded(config, LLAMA.body(config)),
    express=_express,
    entries=_entries,
    suits=LLAMA.suits,
)
