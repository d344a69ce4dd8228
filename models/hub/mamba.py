"""Mamba (2312.00752): a layer is its mixer alone.

Legend: I inner width, N state, R rank of the step sizes, D model width.
"""

import math

from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, must, node, one, target, with_defaults
from models.hub.rows import TAPS, Entries, ParameterSource, PublishedRows, whole
from models.hub.values import ABOVE_ZERO, FLAG, Kind
from models.hub.values import whole as count
from models.mixers.mamba import Mamba

NAME = "MambaForCausalLM"
MIXER = target(Mamba)
AUTO = "auto"


def _rank(config: Config) -> int:
    rank: int | str = config["time_step_rank"]
    return math.ceil(config["hidden_size"] / 16) if isinstance(rank, str) else rank


def _body(config: Config) -> Node:
    mixer = node(
        Mamba,
        expand=float(config["expand"]),
        state=config["state_size"],
        rank=_rank(config),
        conv=config["conv_kernel"],
        conv_bias=config["use_conv_bias"],
    )
    eps = config["layer_norm_epsilon"]
    return parts.stack(config, ["mamba"] * config["num_hidden_layers"], {"mamba": parts.block(mixer, None, eps)}, eps)


def _express(model: Node) -> Config:
    mapping = []
    for name, section in layers(model):
        path, mixer = f"model.blocks.{name}.mixer", with_defaults(section["mixer"], Mamba)
        must(f"model.blocks.{name}", section, {"ffn": None}, NAME)
        if not float(mixer["expand"]).is_integer():
            raise ValueError(f"{path}.expand={mixer['expand']}: must be a whole number, as in {NAME}")
        rank = math.ceil(model["dim"] / 16) if mixer["rank"] is None else mixer["rank"]
        keys = {"expand": int(mixer["expand"]), "state_size": mixer["state"], "time_step_rank": rank}
        mapping.append((path, keys | {"conv_kernel": mixer["conv"], "use_conv_bias": mixer["conv_bias"]}))
    keys = one(mapping, NAME) | {"intermediate_size": one(mapping, NAME)["expand"] * model["dim"]}
    return parts.shapes(model, NAME) | keys | {"layer_norm_epsilon": parts.eps_of(model, NAME), "pad_token_id": None}


def _entries(config: Config) -> Entries:
    D, N, R = config["hidden_size"], config["state_size"], _rank(config)
    inner = config["expand"] * D
    rows = parts.ends(config, body="backbone", embed="embeddings", last="norm_f")
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}.mixer", f"backbone.layers.{i}.mixer"
        rows[f"layers.{i}.mixer_norm.weight"] = whole(f"backbone.layers.{i}.norm.weight", D)
        for part, start in (("x", 0), ("z", inner)):
            rows[f"{ours}.{part}.weight"] = ParameterSource((PublishedRows(f"{theirs}.in_proj.weight", start, inner),))
        rows[f"{ours}.conv.weight"] = whole(f"{theirs}.conv1d.weight", inner, TAPS)
        if config["use_conv_bias"]:
            rows[f"{ours}.conv.bias"] = whole(f"{theirs}.conv1d.bias", inner)
        rows[f"{ours}.dbc.weight"] = whole(f"{theirs}.x_proj.weight", R + 2 * N)
        rows[f"{ours}.dt.weight"] = whole(f"{theirs}.dt_proj.weight", inner)
        rows[f"{ours}.dt_bias"] = whole(f"{theirs}.dt_proj.bias", inner)
        rows |= {f"{ours}.{name}": whole(f"{theirs}.{name}", inner) for name in ("A_log", "D")}
        rows[f"{ours}.out.weight"] = whole(f"{theirs}.out_proj.weight", D)
    return rows


MAMBA = Architecture(
    name=NAME,
    kind="mamba",
    about="Mamba layers without a feed-forward",
    mixers=frozenset({MIXER}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers"), REQUIRED),
        "state_size": 16,
        "expand": 2,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "time_step_rank": AUTO,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    fixed={"hidden_act": "silu", "use_bias": False},
    kinds={
        **dict.fromkeys(("state_size", "expand", "conv_kernel"), count()),
        "time_step_rank": Kind(f"{AUTO}, or {count().words}", lambda v: v == AUTO or count().holds(v)),
        "use_conv_bias": FLAG,
        "layer_norm_epsilon": ABOVE_ZERO,
    },
    fits=lambda config: None,
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: mixers == {MIXER},
)
