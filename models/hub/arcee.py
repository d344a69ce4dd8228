"""AFM (Arcee): as Llama, with a feed-forward of two matrices and relu(x)² between them."""

from typing import Any

from models.ffn import MLP
from models.hub import decoder
from models.hub import layers as parts
from models.hub.architecture import Config, Node, layers, must, node, one, target, with_defaults
from models.hub.rows import Entries, whole
from models.hub.values import FLAG

NAME = "ArceeForCausalLM"
SQUARED = target(MLP)


def _body(config: Config) -> Node:
    bias = config["attention_bias"]
    mixer = parts.attention(config, qkv_bias=bias, out_bias=bias)
    ffn = node(MLP, hidden=config["intermediate_size"], activation="relu2", bias=config["mlp_bias"])
    return decoder.alike(config, mixer, ffn)


def squared_keys(model: Node, who: str) -> Config:
    """`intermediate_size` and `mlp_bias` of layers that all have such a feed-forward. Raises ValueError for others."""
    mapping = []
    for name, section in layers(model):
        ffn, path = section["ffn"] or {"_target_": "null"}, f"model.blocks.{name}.ffn"
        if ffn["_target_"] != SQUARED:
            raise ValueError(f"{path}={ffn['_target_'].rpartition('.')[2]}: must be MLP for {who}")
        mlp = with_defaults(ffn, MLP)
        must(path, mlp, {"activation": "relu2"}, who)
        mapping.append((path, {"intermediate_size": mlp["hidden"], "mlp_bias": mlp["bias"]}))
    keys: Config = one(mapping, who)
    return keys


def _express(model: Node) -> Config:
    bias = decoder.first(model, "qkv_bias")
    flags: dict[str, Any] = {"qk_norm": False, "gate": False, "window": None, "qkv_bias": bias, "out_bias": bias}
    keys = parts.attention_keys(model, NAME, **flags)
    del keys["sliding_window"]
    eps = {"rms_norm_eps": parts.eps_of(model, NAME)}
    return parts.shapes(model, NAME) | eps | keys | squared_keys(model, NAME) | {"attention_bias": bias}


def squared_rows(ours: str, theirs: str, config: Config, layer: int) -> Entries:
    hidden, dim, rows = config["intermediate_size"], config["hidden_size"], {}
    for leaf in ("weight", "bias") if config["mlp_bias"] else ("weight",):
        rows[f"{ours}.up.{leaf}"] = whole(f"{theirs}.up_proj.{leaf}", hidden)
        rows[f"{ours}.down.{leaf}"] = whole(f"{theirs}.down_proj.{leaf}", dim)
    return rows


def _rows(ours: str, theirs: str, config: Config) -> Entries:
    bias = config["attention_bias"]
    return parts.attention_rows(ours, theirs, config, bias=bias, out_bias=bias)


ARCEE = decoder.architecture(
    NAME,
    "arcee",
    about="as Llama, a feed-forward of two matrices and relu²; with biases or none",
    defaults={
        **decoder.USUAL,
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "attention_bias": False, "mlp_bias": False},
    },
    fixed={"hidden_act": "relu2"},
    kinds=parts.HEADS | {"attention_bias": FLAG, "mlp_bias": FLAG},
    fits=lambda config: parts.heads_fit(config, divided=True),
    body=_body,
    express=_express,
    entries=decoder.entries(_rows, squared_rows),
)
