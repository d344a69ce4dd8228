"""RecurrentGemma (2404.07839): RG-LRU in two of three layers, attention within a window in the others, half of each
head rotated; GeGLU with biases, a scaled embedding, capped logits, norms that keep their weights about zero.

Legend: H heads, that is blocks of an RG-LRU, K channels of one.
"""

import math
from typing import Any

import torch
from torch import Tensor

from models.ffn import SwiGLU
from models.hub import decoder
from models.hub import layers as parts
from models.hub.architecture import Architecture, Config, Node, layers, must, node, one, ratio, target, with_defaults
from models.hub.gemma import ACTIVATION, TANH
from models.hub.rows import ABOUT_ZERO, TAPS, Entries, Form, ParameterSource, PublishedRows, joined, whole
from models.hub.values import ABOVE_ZERO, FLAG, WORDS, optional, shown
from models.hub.values import whole as count
from models.mixers.rglru import RGLRU
from models.positions import RoPE

NAME = "RecurrentGemmaForCausalLM"
RECURRENT = target(RGLRU)
KINDS = {"recurrent": "rglru", "attention": "attn"}


def _types(config: Config) -> list[str]:
    """The kind of each layer. Raises ValueError for kinds that are none."""
    types = config["block_types"]
    if not types or set(types) - KINDS.keys():
        raise ValueError(f"config.json: block_types={shown(types)}: must be of {', '.join(KINDS)}")
    return [types[i % len(types)] for i in range(config["num_hidden_layers"])]


def _inner(config: Config) -> int:
    inner: int = config["lru_width"] or config["hidden_size"]
    return inner


def _fits(config: Config) -> None:
    parts.heads_fit(config, divided=True)
    heads, inner = config["num_attention_heads"], _inner(config)
    if inner % heads:
        raise ValueError(f"config.json: num_attention_heads={heads}: must divide lru_width={inner}")
    if config["intermediate_size"] % 2:
        raise ValueError(f"config.json: intermediate_size={config['intermediate_size']}: must be even: half is a width")
    _types(config)


def _body(config: Config) -> Node:
    eps, dim, bias = config["rms_norm_eps"], config["hidden_size"], config["attention_bias"]
    attention = parts.attention(config, fraction=0.5, window=config["sliding_window"], qkv_bias=bias, out_bias=True)
    if attention["positions"]["_target_"] != target(RoPE):
        raise ValueError(f"config.json: rope_type: must be default for {NAME}")
    recurrent = node(
        RGLRU,
        heads=config["num_attention_heads"],
        expand=ratio(_inner(config), dim),
        conv=config["conv1d_width"],
        conv_bias=True,
        bias=True,
    )
    mixers = {"recurrent": ("rglru", recurrent), "attention": ("attn", attention)}
    ffn = node(SwiGLU, hidden=config["intermediate_size"] // 2, activation="gelu_tanh", bias=True)
    more = {"embedding_scale": _scale(dim), "logit_softcap": config["logits_soft_cap"]}
    types = [mixers[each] for each in _types(config)]
    return decoder.body(config | {"rms_norm_eps": eps}, types, ffn, **more)


def _scale(dim: int) -> float:
    """The root, as its reader has it: at bf16."""
    return torch.tensor(math.sqrt(dim), dtype=torch.bfloat16, device="cpu").item()


def _express(model: Node) -> Config:
    types = ["recurrent" if b["mixer"]["_target_"] == RECURRENT else "attention" for _, b in layers(model)]
    bias, window = decoder.first(model, "qkv_bias"), decoder.first(model, "window")
    if window is None:
        raise ValueError(f"model.blocks: window of attention=null: must be a number of tokens for {NAME}")
    flags: dict[str, Any] = {"qk_norm": False, "gate": False, "window": window, "qkv_bias": bias, "out_bias": True}
    keys = parts.attention_keys(model, NAME, partial=True, **flags)
    heads = keys["num_attention_heads"]
    if keys.pop("head_dim") * heads != model["dim"]:
        raise ValueError(f"model.blocks: head_dim of attention: must share out dim={model['dim']} for {NAME}")
    if keys["rope_parameters"]["rope_type"] != "default":
        raise ValueError(f"model.blocks: positions of attention: must be RoPE for {NAME}")
    keys["attention_window_size"] = keys.pop("sliding_window")
    mapping, wide = [], []
    for name, section in layers(model):
        path, ffn = f"model.blocks.{name}", section["ffn"] or {"_target_": "null"}
        if ffn["_target_"] != parts.DENSE:
            raise ValueError(f"{path}.ffn={ffn['_target_'].rpartition('.')[2]}: must be SwiGLU for {NAME}")
        wide.append((f"{path}.ffn.hidden", parts.hidden(f"{path}.ffn", ffn, NAME, activation="gelu_tanh", bias=True)))
        if section["mixer"]["_target_"] == RECURRENT:
            mixer = with_defaults(section["mixer"], RGLRU)
            must(f"{path}.mixer", mixer, {"bias": True, "heads": heads}, NAME)
            if mixer["conv"] is None or mixer["conv_bias"] is False:
                raise ValueError(f"{path}.mixer.conv_bias: must be true, beside a conv, for {NAME}")
            own = {"conv1d_width": mixer["conv"], "lru_width": int(model["dim"] * mixer["expand"])}
            mapping.append((f"{path}.mixer", own))
    if model.get("logit_softcap") is None:
        raise ValueError(f"model.logit_softcap=null: must be above 0, as in {NAME}")
    return {
        **parts.shapes(model, NAME, embedding_scale=_scale(model["dim"])),
        **keys,
        **one(mapping, NAME),
        **{"rms_norm_eps": parts.eps_of(model, NAME), "intermediate_size": 2 * one(wide, NAME)},
        **{"logits_soft_cap": model["logit_softcap"], "hidden_activation": TANH, "attention_bias": bias},
        **{"block_types": types, "pad_token_id": None},
    }


def _gates(width: int) -> Form:
    """Ours [H, K, 2K], the input's gate beside the recurrence's; published rows [K], those of one tensor and block
    behind those of the other."""

    def here(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2, width)).transpose(1, 2).flatten(-2)

    def there(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, width)).transpose(1, 2).flatten(0, 2)

    return Form(lambda shape: 2 * shape[1], lambda shape: (width,), here, there)


def _gate_biases(width: int) -> Form:
    """Ours [H, 2K]; published [H, K] each, block by block in turn."""

    def here(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2)).flatten(1)

    def there(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, width)).flatten(0, 1)

    return Form(lambda shape: 2, lambda shape: (width,), here, there)


def _recurrent_rows(ours: str, theirs: str, config: Config) -> Entries:
    H, inner, D = config["num_attention_heads"], _inner(config), config["hidden_size"]
    K, unit = inner // H, f"{theirs}.rg_lru"
    weights = tuple(PublishedRows(f"{unit}.{x}_gate_weight", h * K, K) for h in range(H) for x in PARTS)
    biases = tuple(PublishedRows(f"{unit}.{x}_gate_bias", h, 1) for h in range(H) for x in PARTS)
    rows = {
        f"{ours}.conv.weight": whole(f"{theirs}.conv_1d.weight", inner, TAPS),
        f"{ours}.conv.bias": whole(f"{theirs}.conv_1d.bias", inner),
        f"{ours}.gates": ParameterSource(weights, _gates(K)),
        f"{ours}.gates_bias": ParameterSource(biases, _gate_biases(K)),
        f"{ours}.Lambda": whole(f"{unit}.recurrent_param", inner),
    }
    for leaf in ("weight", "bias"):
        rows |= {f"{ours}.{x}.{leaf}": whole(f"{theirs}.linear_{x}.{leaf}", inner) for x in ("x", "y")}
        rows[f"{ours}.out.{leaf}"] = whole(f"{theirs}.linear_out.{leaf}", D)
    return rows


PARTS = ("input", "recurrent")


def _entries(config: Config) -> Entries:
    D, hidden, bias = config["hidden_size"], config["intermediate_size"] // 2, config["attention_bias"]
    rows = parts.ends(config, norm=ABOUT_ZERO, last="final_norm")
    for i, kind in enumerate(_types(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows[f"{ours}.mixer_norm.weight"] = whole(f"{theirs}.temporal_pre_norm.weight", D, ABOUT_ZERO)
        rows[f"{ours}.ffn_norm.weight"] = whole(f"{theirs}.channel_pre_norm.weight", D, ABOUT_ZERO)
        names = f"{ours}.mixer", f"{theirs}.temporal_block"
        if kind == "recurrent":
            rows |= _recurrent_rows(*names, config)
        else:
            rows |= parts.attention_rows(*names, config, bias=bias, out_bias=True)
        for leaf in ("weight", "bias"):
            mlp = [f"{theirs}.mlp_block.{x}_proj.{leaf}" for x in ("gate", "up", "down")]
            rows[f"{ours}.ffn.gate_up.{leaf}"] = joined((mlp[0], hidden), (mlp[1], hidden))
            rows[f"{ours}.ffn.down.{leaf}"] = whole(mlp[2], D)
    return rows


RECURRENT_GEMMA = Architecture(
    name=NAME,
    kind="recurrent_gemma",
    about="RG-LRU, attention within a window in some layers, GeGLU with biases, capped logits",
    mixers=frozenset({parts.ATTENTION, RECURRENT}),
    defaults={
        **decoder.USUAL,
        **{"sliding_window": 2048, "conv1d_width": 4, "lru_width": None, "logits_soft_cap": 30.0},
        **{"max_position_embeddings": 8192, "tie_word_embeddings": True, "attention_bias": False},
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    fixed={},
    kinds={
        **parts.HEADS,
        **dict.fromkeys(("sliding_window", "conv1d_width"), count()),
        **{"lru_width": optional(count()), "logits_soft_cap": ABOVE_ZERO, "attention_bias": FLAG},
        **{"block_types": WORDS, "hidden_activation": ACTIVATION},
    },
    fits=_fits,
    unstacked=lambda stored: {
        name: each._replace(shape=(each.shape[0] * each.shape[1], each.shape[2]))
        if name.endswith("_gate_weight") and len(each.shape) == 3
        else each
        for name, each in stored.items()
    },
    stacked=lambda tensors: {
        name: ((shape[0] // shape[1], shape[1], shape[1]), places) if name.endswith("_gate_weight") else (shape, places)
        for name, (shape, places) in tensors.items()
    },
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: mixers == {parts.ATTENTION, RECURRENT},
    aliases={"attention_window_size": "sliding_window"},
    beyond=frozenset({"logit_softcap"}),
)
