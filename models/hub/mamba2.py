"""Mamba-2 (2405.21060): a layer is its mixer alone.

Legend: H heads, I inner width, G groups, N state, D model width.
"""

import math

from models.hub import layers as parts
from models.hub.architecture import (
    REQUIRED,
    Architecture,
    Config,
    Node,
    layers,
    must,
    node,
    one,
    ratio,
    target,
    with_defaults,
)
from models.hub.rows import PLAIN, TAPS, Entries, Form, ParameterSource, PublishedRows, whole
from models.hub.values import ABOVE_ZERO, FLAG, shown
from models.hub.values import whole as whole_number
from models.mixers.mamba2 import Mamba2

NAME = "Mamba2ForCausalLM"
MIXER = target(Mamba2)
PLAIN_SSM: Config = {"out_norm": "gated", "dt_min": 0.0}
UNLIMITED = [[0.0, math.inf], [0.0, {"__float__": "Infinity"}]]  # JSON has no word for it


def _body(config: Config) -> Node:
    heads, inner, dim = config["num_heads"], config["num_heads"] * config["head_dim"], config["hidden_size"]
    eps = config["layer_norm_epsilon"]
    mixer = node(
        Mamba2,
        heads=heads,
        expand=ratio(inner, dim),
        state=config["state_size"],
        groups=config["n_groups"],
        conv=config["conv_kernel"],
        conv_bias=config["use_conv_bias"],
        norm_eps=eps,
    )
    return parts.stack(config, ["mamba"] * config["num_hidden_layers"], {"mamba": parts.block(mixer, None, eps)}, eps)


def _fits(config: Config) -> None:
    heads, wide = config["num_heads"], config["expand"] * config["hidden_size"]
    if heads * config["head_dim"] != wide:
        raise ValueError(
            f"config.json: num_heads={heads}: must be expand * hidden_size / head_dim={wide / config['head_dim']:g}"
        )
    if heads % config["n_groups"]:
        raise ValueError(f"config.json: n_groups={config['n_groups']}: must divide num_heads={heads}")
    if config["time_step_limit"] not in UNLIMITED:
        raise ValueError(f"config.json: time_step_limit={shown(config['time_step_limit'])}: must be [0, Infinity]")


def _express(model: Node) -> Config:
    mapping, dim = [], model["dim"]
    for name, section in layers(model):
        path, mixer = f"model.blocks.{name}.mixer", with_defaults(section["mixer"], Mamba2)
        must(f"model.blocks.{name}", section, {"ffn": None}, NAME)
        must(path, mixer, PLAIN_SSM, NAME)
        inner, heads = int(dim * mixer["expand"]), mixer["heads"]
        if not float(mixer["expand"]).is_integer():
            raise ValueError(f"{path}.expand={mixer['expand']}: must be a whole number, as in {NAME}")
        keys = {"num_heads": heads, "head_dim": inner // heads, "expand": int(mixer["expand"])}
        keys["state_size"] = mixer["state"]
        keys |= {"n_groups": mixer["groups"], "conv_kernel": mixer["conv"], "use_conv_bias": mixer["conv_bias"]}
        mapping.append((path, keys))
    eps = parts.eps_of(model, NAME, {MIXER: Mamba2})
    return parts.shapes(model, NAME) | one(mapping, NAME) | {"layer_norm_epsilon": eps, "pad_token_id": None}


def mixer_rows(
    ours: str,
    theirs: str,
    *,
    dim: int,
    heads: int,
    inner: int,
    groups: int,
    state: int,
    conv_bias: bool,
    normed: bool = True,
) -> Entries:
    """The rows of one layer's mixer. normed: whether its output has a norm."""
    H, G, N = heads, groups, state

    def split(source: str, start: int, form: Form = PLAIN) -> tuple[ParameterSource, ParameterSource]:
        """x, and B and C group by group, of a tensor that has x, all B, all C from a row on."""
        b = start + inner
        groups = tuple(PublishedRows(source, b + part * G * N + g * N, N) for g in range(G) for part in (0, 1))
        return ParameterSource((PublishedRows(source, start, inner),), form), ParameterSource(groups, form)

    into, conv, rows = f"{theirs}.in_proj.weight", f"{theirs}.conv1d", {}
    rows[f"{ours}.z.weight"] = ParameterSource((PublishedRows(into, 0, inner),))
    rows[f"{ours}.x.weight"], rows[f"{ours}.bc.weight"] = split(into, inner)
    rows[f"{ours}.dt.weight"] = ParameterSource((PublishedRows(into, 2 * inner + 2 * G * N, H),))
    rows[f"{ours}.conv.weight"], rows[f"{ours}.bc_conv.weight"] = split(f"{conv}.weight", 0, TAPS)
    if conv_bias:
        rows[f"{ours}.conv.bias"], rows[f"{ours}.bc_conv.bias"] = split(f"{conv}.bias", 0)
    rows |= {f"{ours}.{name}": whole(f"{theirs}.{name}", H) for name in ("A_log", "dt_bias", "D")}
    if normed:
        rows[f"{ours}.norm.weight"] = whole(f"{theirs}.norm.weight", inner)
    rows[f"{ours}.out.weight"] = whole(f"{theirs}.out_proj.weight", dim)
    return rows


def _entries(config: Config) -> Entries:
    D, H = config["hidden_size"], config["num_heads"]
    sizes = {"dim": D, "heads": H, "inner": H * config["head_dim"], "groups": config["n_groups"]}
    sizes |= {"state": config["state_size"], "conv_bias": config["use_conv_bias"]}
    rows = parts.ends(config, body="backbone", embed="embeddings", last="norm_f")
    for i in range(config["num_hidden_layers"]):
        rows[f"layers.{i}.mixer_norm.weight"] = whole(f"backbone.layers.{i}.norm.weight", D)
        rows |= mixer_rows(f"layers.{i}.mixer", f"backbone.layers.{i}.mixer", **sizes)
    return rows


def _suits(model: Node, mixers: set[str]) -> bool:
    return mixers == {MIXER}


MAMBA2 = Architecture(
    name=NAME,
    kind="mamba2",
    about="Mamba-2 layers without a feed-forward (`model=mamba2_tiny`)",
    mixers=frozenset({MIXER}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_heads"), REQUIRED),
        "head_dim": 64,
        "state_size": 128,
        "expand": 2,
        "n_groups": 8,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": [0.0, math.inf],
        "tie_word_embeddings": False,
    },
    fixed={"hidden_act": "silu", "use_bias": False},
    kinds={
        **dict.fromkeys(("num_heads", "state_size", "expand", "n_groups", "conv_kernel"), whole_number()),
        "use_conv_bias": FLAG,
        "layer_norm_epsilon": ABOVE_ZERO,
    },
    fits=_fits,
    body=_body,
    express=_express,
    entries=_entries,
    suits=_suits,
)
