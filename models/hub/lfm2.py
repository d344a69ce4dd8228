"""LFM2 (2511.23404): short convolutions between gates in most layers, attention with `qk_norm` in the others, SwiGLU.

Legend: D model width, W taps.
"""

from models.ffn import SwiGLU
from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, node, one, target, with_defaults
from models.hub.decoder import only_dense
from models.hub.rows import PLAIN, TAPS, Entries, joined, whole
from models.hub.values import ABOVE_ZERO, FLAG, WORDS, listed, optional, shown
from models.hub.values import whole as count
from models.mixers.attention import Attention
from models.mixers.gated_conv import GatedConv

NAME = "Lfm2ForCausalLM"
MIXER = target(GatedConv)
TYPES = {"conv": False, "full_attention": True}  # whether a layer's type is attention


def _attends(config: Config) -> list[bool]:
    """Says of each layer whether it is attention. Raises ValueError for types that are none."""
    number, types = config["num_hidden_layers"], config["layer_types"]
    if types is None:
        indices = config["full_attn_idxs"]
        return [indices is None or i in indices for i in range(number)]
    if len(types) != number or set(types) - TYPES.keys():
        raise ValueError(f"config.json: layer_types={shown(types)}: must be {number} of {', '.join(TYPES)}")
    return [TYPES[each] for each in types]


def _hidden(config: Config) -> int:
    """The width of the feed-forward, which the reader adjusts unless told otherwise."""
    hidden: int = config["intermediate_size"]
    if not config["block_auto_adjust_ff_dim"]:
        return hidden
    hidden = int(2 * hidden / 3)
    if config["block_ffn_dim_multiplier"] is None:
        return hidden
    multiple = config["block_multiple_of"]
    return multiple * -(-int(config["block_ffn_dim_multiplier"] * hidden) // multiple)


def _body(config: Config) -> Node:
    eps, ffn = config["norm_eps"], node(SwiGLU, hidden=_hidden(config))
    attention = parts.attention(config, qk_norm=True, norm_eps=eps)
    mixers = {"attn": attention, "conv": node(GatedConv, conv=config["conv_L_cache"], bias=config["conv_bias"])}
    blocks = {name: parts.block(mixer, ffn, eps) for name, mixer in mixers.items()}
    return parts.stack(config, ["attn" if each else "conv" for each in _attends(config)], blocks, eps)


def _express(model: Node) -> Config:
    keys = parts.attention_keys(model, NAME, window=None, qk_norm=True, gate=False)
    if not keys:  # transformers' cache asks an attention layer for the length
        raise ValueError(f"model.pattern=[{','.join(model['pattern'])}]: must have a layer of attention for {NAME}")
    del keys["sliding_window"]
    mapping = []
    for name, section in layers(model):
        if section["mixer"]["_target_"] == MIXER:
            mixer = with_defaults(section["mixer"], GatedConv)
            convs = {"conv_L_cache": mixer["conv"], "conv_bias": mixer["bias"]}
            mapping.append((f"model.blocks.{name}.mixer", convs))
    types = ["full_attention" if b["mixer"]["_target_"] == parts.ATTENTION else "conv" for _, b in layers(model)]
    eps = {"norm_eps": parts.eps_of(model, NAME, {parts.ATTENTION: Attention})}
    more = {"layer_types": types, "block_auto_adjust_ff_dim": False, "pad_token_id": None}
    return parts.shapes(model, NAME) | eps | keys | (one(mapping, NAME) or {}) | only_dense(model, NAME) | more


def _conv_rows(ours: str, theirs: str, config: Config) -> Entries:
    D = config["hidden_size"]
    rows: Entries = {f"{ours}.conv.weight": whole(f"{theirs}.conv.weight", D, TAPS)}
    for leaf in ("weight", "bias") if config["conv_bias"] else ("weight",):
        rows[f"{ours}.into.{leaf}"] = whole(f"{theirs}.in_proj.{leaf}", 3 * D)
        rows[f"{ours}.out.{leaf}"] = whole(f"{theirs}.out_proj.{leaf}", D)
    if config["conv_bias"]:
        rows[f"{ours}.conv.bias"] = whole(f"{theirs}.conv.bias", D)
    return rows


def _entries(config: Config) -> Entries:
    D, hidden = config["hidden_size"], _hidden(config)
    rows = parts.ends(config, last="embedding_norm")
    for i, attention in enumerate(_attends(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows[f"{ours}.mixer_norm.weight"] = whole(f"{theirs}.operator_norm.weight", D)
        rows[f"{ours}.ffn_norm.weight"] = whole(f"{theirs}.ffn_norm.weight", D)
        if attention:
            names = {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
            rows |= parts.attention_rows(f"{ours}.mixer", f"{theirs}.self_attn", config, norm=PLAIN, names=names)
        else:
            rows |= _conv_rows(f"{ours}.mixer", f"{theirs}.conv", config)
        mlp = f"{theirs}.feed_forward"
        rows[f"{ours}.ffn.gate_up.weight"] = joined((f"{mlp}.w1.weight", hidden), (f"{mlp}.w3.weight", hidden))
        rows[f"{ours}.ffn.down.weight"] = whole(f"{mlp}.w2.weight", D)
    return rows


LFM2 = Architecture(
    name=NAME,
    kind="lfm2",
    about="short convolutions between gates, attention with `qk_norm` in some layers, SwiGLU",
    mixers=frozenset({parts.ATTENTION, MIXER}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
        **{"intermediate_size": 12_288, "num_key_value_heads": 8, "head_dim": None, "norm_eps": 1e-5},
        **{"max_position_embeddings": 128_000, "tie_word_embeddings": True, "rope_theta": 1_000_000.0},
        **{"conv_L_cache": 3, "conv_bias": False, "layer_types": None, "full_attn_idxs": None},
        **{"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256},
    },
    fixed={},
    kinds={
        **parts.HEADS,
        **dict.fromkeys(("conv_bias", "block_auto_adjust_ff_dim"), FLAG),
        **dict.fromkeys(("conv_L_cache", "block_multiple_of"), count()),
        **{"norm_eps": ABOVE_ZERO, "block_ffn_dim_multiplier": optional(ABOVE_ZERO)},
        "layer_types": optional(WORDS),
        "full_attn_idxs": optional(listed(count(0), "whole numbers")),
    },
    fits=parts.heads_fit,
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: MIXER in mixers and mixers <= {parts.ATTENTION, MIXER},
    aliases={"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"},
)
