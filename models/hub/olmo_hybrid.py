"""OLMo Hybrid (2604.03444): Gated DeltaNet with norms before its layers' parts, and attention with norms behind them
and over all heads of queries and keys, with or without positions; SwiGLU.

Legend: H heads of keys, N heads of values, K and V their widths, D model width.
"""

from typing import Any

from models.ffn import SwiGLU
from models.hub import decoder
from models.hub import layers as parts
from models.hub.architecture import (
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
from models.hub.rows import PLAIN, TAPS, Entries, ParameterSource, PublishedRows, joined, whole
from models.hub.tensors import StoredTensor
from models.hub.values import FLAG, WORDS, optional, shown
from models.hub.values import whole as count
from models.mixers.attention import Attention
from models.mixers.gated_deltanet import GatedDeltaNet
from models.positions import NoPE

NAME = "OlmoHybridForCausalLM"
DELTA = target(GatedDeltaNet)
KINDS = {parts.ATTENTION: "full_attention", DELTA: "linear_attention"}
LINEAR = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
OUTPUT_EPS = 1e-5  # of the norm of a head's output, whatever the configuration says of the others
JOINT: dict[str, Any] = {"qk_norm": True, "norm_heads": "all"}


def _sizes(config: Config) -> Config:
    """The configuration with the sizes of the linear layers that it leaves out."""
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    keys = config["linear_num_key_heads"] or heads
    width = config["linear_key_head_dim"] or int(0.75 * dim / keys)
    own = (keys, config["linear_num_value_heads"] or heads, width, config["linear_value_head_dim"] or 2 * width)
    return config | dict(zip(LINEAR, own, strict=True))


def _types(config: Config) -> list[str]:
    """The kinds of the layers. Raises ValueError for a list of others."""
    number, types = config["num_hidden_layers"], config["layer_types"]
    if types is None:
        types = [KINDS[parts.ATTENTION if i % 4 == 3 else DELTA] for i in range(number)]
        if KINDS[parts.ATTENTION] not in types:
            types[-1] = KINDS[parts.ATTENTION]
    if len(types) != number or set(types) != set(KINDS.values()):
        raise ValueError(
            f"config.json: layer_types={shown(types)}: must be {number} of both {', '.join(KINDS.values())}"
        )
    return types


def _rotates(config: Config) -> bool:
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    return rope is None or "rope_theta" not in rope or rope["rope_theta"] is not None


def _body(config: Config) -> Node:
    config = _sizes(config)
    dim, eps, bias = config["hidden_size"], config["rms_norm_eps"], config["attention_bias"]
    heads, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    rope = config if _rotates(config) else config | {"rope_parameters": None, "rope_scaling": None}
    attention = parts.attention(rope, norm_eps=eps, qkv_bias=bias, out_bias=bias, **JOINT)
    if not _rotates(config):
        attention["positions"] = node(NoPE, partial=False)
    delta = node(
        GatedDeltaNet,
        heads=heads,
        value_heads=values,
        expand_k=ratio(heads * config["linear_key_head_dim"], dim),
        expand_v=ratio(values * config["linear_value_head_dim"], dim),
        conv=config["linear_conv_kernel_dim"],
        negative_eigenvalues=config["linear_allow_neg_eigval"],
        norm_eps=OUTPUT_EPS,
    )
    ffn = node(SwiGLU, hidden=config["intermediate_size"])
    blocks = {"attn": parts.block(attention, ffn, eps, "post"), "gdn": parts.block(delta, ffn, eps)}
    return parts.stack(config, ["attn" if each == "full_attention" else "gdn" for each in _types(config)], blocks, eps)


def _express(model: Node) -> Config:
    types = [KINDS[section["mixer"]["_target_"]] for _, section in layers(model)]
    if set(types) != set(KINDS.values()):
        raise ValueError(f"model.pattern=[{','.join(model['pattern'])}]: must have layers of both kinds for {NAME}")
    bias = decoder.first(model, "qkv_bias")
    turning = [decoder.rotates(mixer) for _, mixer in decoder.attentions(model)]
    flags = {**JOINT, "gate": False, "window": None, "qkv_bias": bias, "out_bias": bias}
    same = model if any(turning) else decoder.changed(model, lambda mixer: {"positions": None})
    keys = parts.attention_keys(same, NAME, **flags)
    del keys["sliding_window"]
    if not any(turning):
        keys["rope_parameters"] = {"rope_type": "default", "rope_theta": None}
    deltas, eps = [], [("model.norm_eps", model.get("norm_eps", 1e-5))]
    for name, section in layers(model):
        path, mixer = f"model.blocks.{name}", section["mixer"]
        linear = mixer["_target_"] == DELTA
        must(path, {"norms": "pre"} | section, {"norms": "pre" if linear else "post"}, NAME)
        eps.append((f"{path}.norm_eps", section.get("norm_eps", 1e-5)))
        if linear:
            deltas.append((f"{path}.mixer", _delta_keys(f"{path}.mixer", with_defaults(mixer, GatedDeltaNet), model)))
        else:
            eps.append((f"{path}.mixer.norm_eps", with_defaults(mixer, Attention)["norm_eps"]))
    more = {"layer_types": types, "attention_bias": bias, "rms_norm_eps": one(eps, NAME), "pad_token_id": None}
    hidden = decoder.only_dense(model, NAME)
    return parts.shapes(model, NAME) | keys | one(deltas, NAME) | hidden | more


def _delta_keys(path: str, mixer: Node, model: Node) -> Config:
    must(path, mixer, {"conv_bias": False, "norm_eps": OUTPUT_EPS}, NAME)
    if mixer["conv"] is None:
        raise ValueError(f"{path}.conv=null: must be at least 1, as in {NAME}")
    heads, values, dim = mixer["heads"], mixer["value_heads"] or mixer["heads"], model["dim"]
    widths = int(dim * mixer["expand_k"]) // heads, int(dim * mixer["expand_v"]) // values
    sizes = dict(zip(LINEAR, (heads, values, *widths), strict=True))
    flags = {"linear_conv_kernel_dim": mixer["conv"], "linear_allow_neg_eigval": mixer["negative_eigenvalues"]}
    return sizes | flags


def _delta_rows(ours: str, theirs: str, config: Config) -> Entries:
    H, N, K, V = (config[key] for key in LINEAR)
    widths = (("q", H * K), ("k", H * K), ("v", N * V))
    rates = (PublishedRows(f"{theirs}.{part}_proj.weight", n, 1) for n in range(N) for part in ("a", "b"))
    return {
        f"{ours}.qkv.weight": joined(*((f"{theirs}.{x}_proj.weight", width) for x, width in widths)),
        f"{ours}.conv.weight": joined(*((f"{theirs}.{x}_conv1d.weight", width) for x, width in widths), form=TAPS),
        f"{ours}.gate.weight": whole(f"{theirs}.g_proj.weight", N * V),
        f"{ours}.rates.weight": ParameterSource(tuple(rates)),
        f"{ours}.A_log": whole(f"{theirs}.A_log", N),
        f"{ours}.dt_bias": whole(f"{theirs}.dt_bias", N),
        f"{ours}.norm.weight": whole(f"{theirs}.o_norm.weight", V),
        f"{ours}.out.weight": whole(f"{theirs}.o_proj.weight", config["hidden_size"]),
    }


def _entries(config: Config) -> Entries:
    config = _sizes(config)
    rows, D, bias = parts.ends(config), config["hidden_size"], config["attention_bias"]
    for i, kind in enumerate(_types(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        if kind == "full_attention":
            names = decoder.POST
            own = parts.attention_rows(
                f"{ours}.mixer", f"{theirs}.self_attn", config, norm=PLAIN, joint=True, bias=bias, out_bias=bias
            )
        else:
            names = {"mixer_norm": "attention_layer_norm", "ffn_norm": "feedforward_layer_norm"}
            own = _delta_rows(f"{ours}.mixer", f"{theirs}.linear_attn", config)
        rows |= own | {f"{ours}.{norm}.weight": whole(f"{theirs}.{name}.weight", D) for norm, name in names.items()}
        rows |= parts.dense_rows(f"{ours}.ffn", f"{theirs}.mlp", config["intermediate_size"], D)
    return rows


def _unstacked(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The norms behind attention under their own name: `transformers` writes the one behind the mixer under that of
    other layers."""
    attention = {name.partition(".self_attn.")[0] for name in stored if ".self_attn." in name}
    tensors = {}
    for name, each in stored.items():
        layer, found, _ = name.partition(".feedforward_layer_norm.")
        swapped = found and layer in attention
        tensors[name.replace("feedforward_layer_norm", "post_attention_layernorm") if swapped else name] = each
    return tensors


def _fits(config: Config) -> None:
    parts.heads_fit(config)
    sizes = _sizes(config)
    keys, values = sizes["linear_num_key_heads"], sizes["linear_num_value_heads"]
    if values % keys:
        raise ValueError(
            f"config.json: linear_num_value_heads={values}: must be a multiple of linear_num_key_heads={keys}"
        )


OLMO_HYBRID = Architecture(
    name=NAME,
    kind="olmo_hybrid",
    about="Gated DeltaNet, and attention as in OLMo-2, with or without positions; SwiGLU",
    mixers=frozenset(KINDS),
    defaults={
        **decoder.USUAL,
        **dict.fromkeys(LINEAR),
        **{"max_position_embeddings": 65_536, "attention_bias": False, "layer_types": None},
        **{"linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True},
    },
    fixed={"hidden_act": "silu"},
    kinds={
        **parts.HEADS,
        **dict.fromkeys(LINEAR, optional(count())),
        **{"linear_conv_kernel_dim": count(), "layer_types": optional(WORDS)},
        **dict.fromkeys(("attention_bias", "linear_allow_neg_eigval"), FLAG),
    },
    fits=_fits,
    unstacked=_unstacked,
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: mixers == KINDS.keys(),
)
