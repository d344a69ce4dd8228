"""Mixtral (2401.04088): attention as in Mistral, then experts whose weights add up to 1."""

from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node
from models.hub.rows import Entries, ParameterSource
from models.hub.tensors import StoredTensor
from models.hub.values import optional
from models.hub.values import whole as count

NAME = "MixtralForCausalLM"
PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # of an expert, as others name them and as this does


def _experts(config: Config) -> Config:
    """The same under the names that other mixtures have."""
    names = {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}
    return config | {ours: config[theirs] for ours, theirs in names.items()} | {"norm_topk_prob": True}


def _fits(config: Config) -> None:
    parts.heads_fit(config)
    chosen, there = config["num_experts_per_tok"], config["num_local_experts"]
    if chosen > there:
        raise ValueError(f"config.json: num_experts_per_tok={chosen}: must be at most num_local_experts={there}")
    if chosen == 1 < there:
        raise ValueError("config.json: num_experts_per_tok=1: must be at least 2: every weight would be 1")


def _body(config: Config) -> Node:
    eps, mixer = config["rms_norm_eps"], parts.attention(config, window=config["sliding_window"])
    blocks = {"moe": parts.block(mixer, parts.mixture(_experts(config)), eps)}
    return parts.stack(config, ["moe"] * config["num_hidden_layers"], blocks, eps)


def _express(model: Node) -> Config:
    keys = parts.attention_keys(model, NAME, qk_norm=False, gate=False)
    mapping = parts.ffn_keys(model, NAME, shared_hidden=0, renormalise=True)
    if mapping["mlp_only_layers"]:
        raise ValueError(f"model.blocks: must have MoE in every layer for {NAME}")
    experts = {"num_local_experts": mapping["num_experts"], "intermediate_size": mapping["moe_intermediate_size"]}
    experts["num_experts_per_tok"] = mapping["num_experts_per_tok"]
    return parts.shapes(model, NAME) | {"rms_norm_eps": parts.eps_of(model, NAME)} | keys | experts


def renamed(name: str) -> str:
    for usual, own in PARTS.items():
        name = name.replace(f".{usual}.weight", f".{own}.weight") if ".experts." in name else name
    return name


def unstacked(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Experts that lie stacked in a module of another name, as `transformers` holds them in memory."""
    tensors = parts.unstacked(stored)
    return {renamed(name).replace(".mlp.", ".block_sparse_moe."): each for name, each in tensors.items()}


def _entries(config: Config) -> Entries:
    rows, D, full = parts.ends(config), config["hidden_size"], _experts(config)
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows |= parts.norms(i, D)
        rows |= parts.attention_rows(f"{ours}.mixer", f"{theirs}.self_attn", config)
        for name, entry in parts.mixture_rows(f"{ours}.ffn", f"{theirs}.block_sparse_moe", full).items():
            pieces = (piece._replace(source=renamed(piece.source)) for piece in entry.pieces)
            rows[name] = ParameterSource(tuple(pieces), entry.form)
    return rows


MIXTRAL = Architecture(
    name=NAME,
    kind="mixtral",
    about="attention as in Mistral, and experts in every layer",
    mixers=frozenset({parts.ATTENTION}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
        "intermediate_size": 14_336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
    fixed={"hidden_act": "silu"},
    kinds={
        **parts.HEADS,
        **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), count()),
        "sliding_window": optional(count()),
    },
    fits=_fits,
    unstacked=unstacked,
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: mixers == {parts.ATTENTION},
    aliases={"num_experts": "num_local_experts"},
)
