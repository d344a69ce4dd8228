"""Mamba-2 (2405.21060): a layer is its mixer alone.

Legend: H heads, I inner width, G groups, N state, D model width.
"""

import math
from typing import Any

from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, must, node, one, ratio, target, told
from models.hub.rows import PLAIN, TAPS, Entries, Entry, Form, Rows, whole
from models.mixers.mamba2 import Mamba2

NAME = "Mamba2ForCausalLM"
EPS = 1e-5  # of our norm of the output, and of every released model
MIXER = target(Mamba2)


def _body(config: Config) -> Node:
    heads, inner, dim = config["num_heads"], config["num_heads"] * config["head_dim"], config["hidden_size"]
    if inner != int(config["expand"] * dim):
        raise ValueError(
            f"config.json: num_heads={heads}: must be expand * hidden_size / head_dim="
            f"{int(config['expand'] * dim) / config['head_dim']:g}"
        )
    if [_number(each) for each in config["time_step_limit"]] != [0.0, math.inf]:
        raise ValueError(f"config.json: time_step_limit={config['time_step_limit']}: must be [0, Infinity]")
    mixer = node(
        Mamba2,
        heads=heads,
        expand=ratio(inner, dim),
        state=config["state_size"],
        groups=config["n_groups"],
        conv=config["conv_kernel"],
    )
    return parts.stack(config, ["mamba"] * config["num_hidden_layers"], {"mamba": parts.block(mixer, None, EPS)}, EPS)


def _number(value: Any) -> float:
    """A number of a config.json; what JSON has none for is written {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _express(model: Node) -> Config:
    found, dim = [], model["dim"]
    for name, section in layers(model):
        path, mixer = f"model.blocks.{name}.mixer", told(section["mixer"], Mamba2)
        must(f"model.blocks.{name}", section, {"ffn": None}, NAME)
        inner, heads = int(dim * mixer["expand"]), mixer["heads"]
        if not float(mixer["expand"]).is_integer():
            raise ValueError(f"{path}.expand={mixer['expand']}: must be a whole number, as in {NAME}")
        keys = {"num_heads": heads, "head_dim": inner // heads, "expand": int(mixer["expand"])}
        keys["state_size"] = mixer["state"]
        found.append((path, keys | {"n_groups": mixer["groups"], "conv_kernel": mixer["conv"]}))
    if (eps := parts.eps_of(model, NAME)) != EPS:
        raise ValueError(f"model.norm_eps={eps}: must be {EPS}, that of the mixer's norm: {NAME} has one for all")
    return parts.shapes(model, NAME) | one(found, NAME) | {"layer_norm_epsilon": EPS, "pad_token_id": None}


def _entries(config: Config) -> Entries:
    D, H, G, N = config["hidden_size"], config["num_heads"], config["n_groups"], config["state_size"]
    inner = H * config["head_dim"]
    rows = parts.ends(config, body="backbone", embed="embeddings", last="norm_f")

    def split(source: str, start: int, form: Form = PLAIN) -> tuple[Entry, Entry]:
        """x, and B and C group by group, of a tensor that has x, all B, all C from a row on."""
        b = start + inner
        groups = tuple(Rows(source, b + part * G * N + g * N, N) for g in range(G) for part in (0, 1))
        return Entry((Rows(source, start, inner),), form), Entry(groups, form)

    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}.mixer", f"backbone.layers.{i}.mixer"
        into, conv = f"{theirs}.in_proj.weight", f"{theirs}.conv1d"
        rows[f"layers.{i}.mixer_norm.weight"] = whole(f"backbone.layers.{i}.norm.weight", D)
        rows[f"{ours}.z.weight"] = Entry((Rows(into, 0, inner),))
        rows[f"{ours}.x.weight"], rows[f"{ours}.bc.weight"] = split(into, inner)
        rows[f"{ours}.dt.weight"] = Entry((Rows(into, 2 * inner + 2 * G * N, H),))
        rows[f"{ours}.conv.weight"], rows[f"{ours}.bc_conv.weight"] = split(f"{conv}.weight", 0, TAPS)
        rows[f"{ours}.conv.bias"], rows[f"{ours}.bc_conv.bias"] = split(f"{conv}.bias", 0)
        rows |= {f"{ours}.{name}": whole(f"{theirs}.{name}", H) for name in ("A_log", "dt_bias", "D")}
        rows[f"{ours}.norm.weight"] = whole(f"{theirs}.norm.weight", inner)
        rows[f"{ours}.out.weight"] = whole(f"{theirs}.out_proj.weight", D)
    return rows


def _suits(model: Node, mixers: set[str]) -> bool:
    return mixers == {MIXER}


MAMBA2 = Architecture(
    name=NAME,
    kind="mamba2",
    mixers=frozenset({MIXER}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_heads"), REQUIRED),
        "head_dim": 64,
        "state_size": 128,
        "expand": 2,
        "n_groups": 8,
        "conv_kernel": 4,
        "time_step_limit": [0.0, math.inf],
        "tie_word_embeddings": False,
    },
    fixed={"hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": EPS},
    body=_body,
    express=_express,
    entries=_entries,
    suits=_suits,
)
