"""Two mixtures whose attention other families have: MiniMax-M2 (norms of queries and keys over all heads, every layer
sparse, a bias that chooses) and dots.llm1 (2506.05767; norms a head, windows in the last layers,
DeepSeek-V3's experts)."""

from typing import Any

from models.hub import decoder, sigmoid_moe
from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Config, Node
from models.hub.mixtral import renamed, unstacked
from models.hub.rows import PLAIN, Entries, ParameterSource, whole
from models.hub.values import FLAG, WORDS, optional
from models.hub.values import whole as count
from models.mixers.attention import Attention

MINIMAX, DOTS = "MiniMaxM2ForCausalLM", "Dots1ForCausalLM"


# --- MiniMax-M2


def _experts(config: Config) -> Config:
    """The same in the words of DeepSeek-V3's."""
    names = {"n_routed_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}
    fixed = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
    fixed |= {"n_shared_experts": 0, "first_k_dense_replace": 0}
    return config | {ours: config[theirs] for ours, theirs in names.items()} | fixed


def _rotary(config: Config) -> Config:
    """The configuration with the share of a head that its older key says."""
    turned = config["rotary_dim"]
    return config if turned is None else config | {"partial_rotary_factor": turned / config["head_dim"]}


def _minimax_body(config: Config) -> Node:
    norm: dict[str, Any] = {"qk_norm": True, "norm_heads": "all", "norm_eps": config["rms_norm_eps"]}
    mixer = parts.attention(_rotary(config), fraction=1.0, **norm)
    return sigmoid_moe.body(_experts(config), [("attn", mixer)] * config["num_hidden_layers"])


def _minimax_express(model: Node) -> Config:
    norm: dict[str, Any] = {"qk_norm": True, "norm_heads": "all"}
    keys = parts.attention_keys(model, MINIMAX, partial=True, window=None, gate=False, **norm)
    del keys["sliding_window"]
    plain = {"renormalise": True, "scale": 1.0, "shared_hidden": 0, "expert_groups": 1}
    experts = sigmoid_moe.keys(model, MINIMAX, **plain)
    if experts["first_k_dense_replace"]:
        raise ValueError(f"model.blocks: must have MoE in every layer for {MINIMAX}")
    sizes = {"num_local_experts": experts["n_routed_experts"], "intermediate_size": experts["moe_intermediate_size"]}
    sizes |= {"num_experts_per_tok": experts["num_experts_per_tok"]}
    eps = {"rms_norm_eps": parts.eps_of(model, MINIMAX, {parts.ATTENTION: Attention})}
    return parts.shapes(model, MINIMAX) | eps | keys | sizes


def _minimax_ffn(ours: str, theirs: str, config: Config, layer: int) -> Entries:
    theirs, rows = theirs.replace(".mlp", ".block_sparse_moe"), {}
    usual = parts.mixture_rows(ours, theirs, config | {"num_experts": config["num_local_experts"], **_width(config)})
    for name, entry in usual.items():
        pieces = (piece._replace(source=renamed(piece.source)) for piece in entry.pieces)
        rows[name] = ParameterSource(tuple(pieces), entry.form)
    bias = whole(f"{theirs}.e_score_correction_bias", config["num_local_experts"])
    return rows | {f"{ours}.router.selection_bias": bias}


def _width(config: Config) -> Config:
    return {"moe_intermediate_size": config["intermediate_size"]}


def _minimax_fits(config: Config) -> None:
    parts.heads_fit(config)
    sigmoid_moe.fits(_experts(config), "num_local_experts")


MINIMAX_M2 = decoder.architecture(
    MINIMAX,
    "minimax_m2",
    about="attention with norms of q and k over all heads, experts with a bias that chooses in every layer",
    defaults={
        **decoder.USUAL,
        **{"intermediate_size": 1536, "num_local_experts": 256, "num_experts_per_tok": 8},
        **{"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 196_608, "rotary_dim": None},
    },
    fixed={"hidden_act": "silu"},
    kinds={
        **parts.HEADS,
        **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), count()),
        "rotary_dim": optional(count()),
    },
    fits=_minimax_fits,
    unstacked=unstacked,
    body=_minimax_body,
    express=_minimax_express,
    entries=decoder.entries(
        lambda ours, theirs, config: parts.attention_rows(ours, theirs, config, norm=PLAIN, joint=True), _minimax_ffn
    ),
    aliases={"num_experts": "num_local_experts"},
)


# --- dots.llm1


def _dots_body(config: Config) -> Node:
    bias, norm = config["attention_bias"], {"qk_norm": True, "norm_eps": config["rms_norm_eps"]}
    plain = parts.attention(config, qkv_bias=bias, out_bias=bias, **norm)
    windowed = {**plain, "window": config["sliding_window"]}
    flags = decoder.windows(config, lambda i: i >= config["max_window_layers"])
    return sigmoid_moe.body(config, [("window", windowed) if each else ("attn", plain) for each in flags])


def _dots_express(model: Node) -> Config:
    bias = decoder.first(model, "qkv_bias")
    flags = {"qk_norm": True, "gate": False, "qkv_bias": bias, "out_bias": bias}
    keys = parts.attention_keys(decoder.changed(model, lambda mixer: {"window": None}), DOTS, **flags)
    windows = decoder.window_keys(model, DOTS)
    del windows["use_sliding_window"]
    eps = {"rms_norm_eps": parts.eps_of(model, DOTS, {parts.ATTENTION: Attention})}
    return parts.shapes(model, DOTS) | eps | keys | sigmoid_moe.keys(model, DOTS) | windows | {"attention_bias": bias}


def _dots_rows(ours: str, theirs: str, config: Config) -> Entries:
    bias = config["attention_bias"]
    return parts.attention_rows(ours, theirs, config, norm=PLAIN, bias=bias, out_bias=bias)


def _dots_fits(config: Config) -> None:
    parts.heads_fit(config)
    sigmoid_moe.fits(config)


DOTS1 = decoder.architecture(
    DOTS,
    "dots1",
    about="attention with `qk_norm`, a window in some layers or none, experts as DeepSeek-V3's",
    defaults={
        **decoder.USUAL,
        **sigmoid_moe.DEFAULTS,
        **dict.fromkeys(("n_routed_experts", "num_experts_per_tok"), REQUIRED),
        **{"n_shared_experts": None, "first_k_dense_replace": 0, "norm_topk_prob": False},
        **{"intermediate_size": 10_944, "moe_intermediate_size": 1408, "num_key_value_heads": 32},
        **{"max_position_embeddings": 2048, "attention_bias": False},
        **{"sliding_window": 4096, "max_window_layers": 62, "layer_types": None},
    },
    fixed={"hidden_act": "silu"},
    kinds={
        **parts.HEADS,
        **sigmoid_moe.KINDS,
        **{"attention_bias": FLAG, "sliding_window": optional(count()), "layer_types": optional(WORDS)},
        "max_window_layers": count(0),
    },
    fits=_dots_fits,
    unstacked=parts.unstacked,
    body=_dots_body,
    express=_dots_express,
    entries=decoder.entries(_dots_rows, sigmoid_moe.rows),
)
