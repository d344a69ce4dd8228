"""Mamba (2312.00752), and Falcon Mamba (2410.05355), which normalises what the step sizes are made of, B and C: a layer
is its mixer alone. Jamba has the same mixer; what they share is here.

Legend: I inner width, N state, R rank of the step sizes, D model width.
"""

import math
from typing import Any

from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, must, node, one, target, with_defaults
from models.hub.rows import TAPS, Entries, ParameterSource, PublishedRows, whole
from models.hub.values import ABOVE_ZERO, FLAG, Kind
from models.hub.values import whole as count
from models.mixers.mamba import Mamba

NAME, FALCON = "MambaForCausalLM", "FalconMambaForCausalLM"
MIXER = target(Mamba)
AUTO = "auto"


def _rank(config: Config) -> int:
    rank: int | str = config["time_step_rank"]
    return math.ceil(config["hidden_size"] / 16) if isinstance(rank, str) else rank


def _body(config: Config, **norms: Any) -> Node:
    mixer = node(
        Mamba,
        expand=float(config["expand"]),
        state=config["state_size"],
        rank=_rank(config),
        conv=config["conv_kernel"],
        conv_bias=config["use_conv_bias"],
        **norms,
    )
    eps = config["layer_norm_epsilon"]
    return parts.stack(config, ["mamba"] * config["num_hidden_layers"], {"mamba": parts.block(mixer, None, eps)}, eps)


def _express(model: Node, who: str, inner_norm: str) -> Config:
    mapping, eps = [], []
    for name, section in layers(model):
        path, mixer = f"model.blocks.{name}.mixer", with_defaults(section["mixer"], Mamba)
        must(f"model.blocks.{name}", section, {"ffn": None}, who)
        must(path, mixer, {"inner_norm": inner_norm}, who)
        if not float(mixer["expand"]).is_integer():
            raise ValueError(f"{path}.expand={mixer['expand']}: must be a whole number, as in {who}")
        rank = math.ceil(model["dim"] / 16) if mixer["rank"] is None else mixer["rank"]
        keys = {"expand": int(mixer["expand"]), "state_size": mixer["state"], "time_step_rank": rank}
        mapping.append((path, keys | {"conv_kernel": mixer["conv"], "use_conv_bias": mixer["conv_bias"]}))
        eps.append((f"{path}.norm_eps", mixer["norm_eps"]))
    keys = one(mapping, who) | {"intermediate_size": one(mapping, who)["expand"] * model["dim"]}
    keys |= {"mixer_rms_eps": one(eps, who)} if inner_norm != "none" else {}
    return parts.shapes(model, who) | keys | {"layer_norm_epsilon": parts.eps_of(model, who), "pad_token_id": None}


def mixer_rows(ours: str, theirs: str, *, dim: int, inner: int, state: int, rank: int, conv_bias: bool) -> Entries:
    """The rows of one layer's mixer."""
    rows: Entries = {}
    for part, start in (("x", 0), ("z", inner)):
        rows[f"{ours}.{part}.weight"] = ParameterSource((PublishedRows(f"{theirs}.in_proj.weight", start, inner),))
    rows[f"{ours}.conv.weight"] = whole(f"{theirs}.conv1d.weight", inner, TAPS)
    if conv_bias:
        rows[f"{ours}.conv.bias"] = whole(f"{theirs}.conv1d.bias", inner)
    rows[f"{ours}.dbc.weight"] = whole(f"{theirs}.x_proj.weight", rank + 2 * state)
    rows[f"{ours}.dt.weight"] = whole(f"{theirs}.dt_proj.weight", inner)
    rows[f"{ours}.dt_bias"] = whole(f"{theirs}.dt_proj.bias", inner)
    rows |= {f"{ours}.{name}": whole(f"{theirs}.{name}", inner) for name in ("A_log", "D")}
    rows[f"{ours}.out.weight"] = whole(f"{theirs}.out_proj.weight", dim)
    return rows


def _entries(config: Config) -> Entries:
    D = config["hidden_size"]
    sizes = {"dim": D, "inner": config["expand"] * D, "state": config["state_size"], "rank": _rank(config)}
    rows = parts.ends(config, body="backbone", embed="embeddings", last="norm_f")
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}.mixer", f"backbone.layers.{i}.mixer"
        rows[f"layers.{i}.mixer_norm.weight"] = whole(f"backbone.layers.{i}.norm.weight", D)
        rows |= mixer_rows(ours, theirs, conv_bias=config["use_conv_bias"], **sizes)
    return rows


DEFAULTS: Config = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers"), REQUIRED),
    "state_size": 16,
    "expand": 2,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "time_step_rank": AUTO,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
RANK = Kind(f"{AUTO}, or {count().words}", lambda v: v == AUTO or count().holds(v))
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("state_size", "expand", "conv_kernel"), count()),
    "time_step_rank": RANK,
    "use_conv_bias": FLAG,
    "layer_norm_epsilon": ABOVE_ZERO,
}


def _architecture(name: str, kind: str, inner_norm: str, **values: Any) -> Architecture:
    return Architecture(
        name=name,
        kind=kind,
        mixers=frozenset({MIXER}),
        fixed={"hidden_act": "silu", "use_bias": False},
        fits=lambda config: None,
        express=lambda model: _express(model, name, inner_norm),
        entries=_entries,
        suits=lambda model, mixers: mixers == {MIXER},
        **values,
    )


MAMBA = _architecture(
    *(NAME, "mamba", "none"),
    about="Mamba layers without a feed-forward",
    defaults=DEFAULTS,
    kinds=KINDS,
    body=_body,
)
FALCON_MAMBA = _architecture(
    *(FALCON, "falcon_mamba", "plain"),
    about="as Mamba, what the step sizes are made of, B and C normalised",
    defaults=DEFAULTS | {"mixer_rms_eps": 1e-6},
    kinds=KINDS | {"mixer_rms_eps": ABOVE_ZERO},
    body=lambda config: _body(config, inner_norm="plain", norm_eps=config["mixer_rms_eps"]),
)
