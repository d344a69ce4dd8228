"""Granite 3 with experts in every layer, alone or beside one that all tokens pass: Granite 3's factors, and experts
whose weights add up to 1. Their tensors have three dimensions."""

from typing import Any

from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node
from models.hub.bamba import times
from models.hub.granite import KINDS, MULTIPLIERS, folded, folded_attention, folded_ends, ones
from models.hub.rows import Entries, PublishedTensors, whole
from models.hub.tensors import StoredTensor
from models.hub.values import Kind
from models.hub.values import whole as count

ALONE, SHARED = "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"
STACKED = {"experts.gate_up_proj": "input_linear.weight", "experts.down_proj": "output_linear.weight"}
STACKED |= {"block_sparse_moe.gate.weight": "block_sparse_moe.router.layer.weight"}
EXPERT_KINDS: dict[str, Kind] = dict.fromkeys(("num_local_experts", "num_experts_per_tok"), count())


def experts(config: Config) -> Config:
    """The same under the names that other mixtures have."""
    names = {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}
    return config | {ours: config[theirs] for ours, theirs in names.items()} | {"norm_topk_prob": True}


def unstacked(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Experts one by one, of their published tensors or of those that `transformers` holds in memory."""
    names = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
    names |= {"router.layer.weight": "gate.weight", "router.weight": "gate.weight"}
    tensors = {}
    for name, each in stored.items():
        stem, sparse, last = name.partition(".block_sparse_moe.")
        tensors[stem + sparse + names.get(last, last)] = each
    return parts.unstacked(tensors)


def stacked(tensors: PublishedTensors) -> PublishedTensors:
    """The published tensors of experts that a table names one by one."""
    return parts.stacked(tensors, STACKED)


def expert_keys(model: Node, who: str, **fixed: Any) -> Config:
    """The keys of a config.json for experts in every layer. Raises ValueError. fixed: further keys of the experts."""
    keys = parts.ffn_keys(model, who, renormalise=True, shared_gate=False, **fixed)
    if keys["mlp_only_layers"]:
        raise ValueError(f"model.blocks: must have MoE in every layer for {who}")
    return {
        "num_local_experts": keys["num_experts"],
        "num_experts_per_tok": keys["num_experts_per_tok"],
        "intermediate_size": keys["moe_intermediate_size"],
        "shared_intermediate_size": keys["shared_expert_intermediate_size"],
    }


def expert_rows(ours: str, theirs: str, config: Config) -> Entries:
    """The rows of a layer's experts and of the one beside them, times the factor of the residual stream."""
    residual, shared = config["residual_multiplier"], config["shared_intermediate_size"]
    rows = parts.mixture_rows(ours, f"{theirs}.block_sparse_moe", experts(config))
    rows = times(rows, f"{ours}.experts.down", residual)
    return rows | shared_rows(f"{ours}.shared", f"{theirs}.shared_mlp", config) if shared else rows


def shared_rows(ours: str, theirs: str, config: Config) -> Entries:
    """The rows of a SwiGLU whose gates and values lie in one tensor, times the factor of the residual stream."""
    into = whole(f"{theirs}.input_linear.weight", 2 * config["shared_intermediate_size"])
    rows = {f"{ours}.gate_up.weight": into}
    rows[f"{ours}.down.weight"] = whole(f"{theirs}.output_linear.weight", config["hidden_size"])
    return times(rows, f"{ours}.down.weight", config["residual_multiplier"])


def chosen_fit(config: Config) -> None:
    """Raises ValueError for a choice of experts that is none."""
    chosen, there = config["num_experts_per_tok"], config["num_local_experts"]
    if not 1 < chosen <= there:
        raise ValueError(f"config.json: num_experts_per_tok={chosen}: must be 2 to num_local_experts={there}")


def _fits(config: Config) -> None:
    parts.heads_fit(config, divided=True)
    chosen_fit(config)


def _body(config: Config) -> Node:
    eps, shared = config["rms_norm_eps"], config["shared_intermediate_size"]
    ffn = parts.mixture(experts(config), shared_hidden=shared, shared_gate=False)
    blocks = {"moe": parts.block(parts.attention(config), ffn, eps)}
    return folded(config, parts.stack(config, ["moe"] * config["num_hidden_layers"], blocks, eps))


def _express(model: Node, who: str, **fixed: Any) -> Config:
    keys = parts.attention_keys(model, who, window=None, qk_norm=False, gate=False)
    del keys["sliding_window"]
    if keys["head_dim"] * keys["num_attention_heads"] != model["dim"]:
        raise ValueError(f"model.blocks: head_dim={keys['head_dim']}: must share out dim={model['dim']} for {who}")
    eps = {"rms_norm_eps": parts.eps_of(model, who)}
    return parts.shapes(model, who) | eps | keys | ones(keys) | expert_keys(model, who, **fixed)


def _entries(config: Config) -> Entries:
    rows = folded_ends(config, parts.ends(config))
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        own = parts.attention_rows(f"{ours}.mixer", f"{theirs}.self_attn", config)
        rows |= parts.norms(i, config["hidden_size"]) | folded_attention(f"{ours}.mixer", config, own)
        rows |= expert_rows(f"{ours}.ffn", theirs, config)
    return rows


def _architecture(name: str, kind: str, about: str, shared: Config, **fixed: Any) -> Architecture:
    return Architecture(
        name=name,
        kind=kind,
        about=about,
        mixers=frozenset({parts.ATTENTION}),
        defaults={
            **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
            **dict.fromkeys(MULTIPLIERS, 1.0),
            **{"intermediate_size": 11_008, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": None},
            **{"num_key_value_heads": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
            **{"tie_word_embeddings": False, "shared_intermediate_size": 0},
        },
        fixed={"hidden_act": "silu", "attention_bias": False} | shared,
        kinds=parts.HEADS | KINDS | EXPERT_KINDS | {"shared_intermediate_size": count(0)},
        fits=_fits,
        unstacked=unstacked,
        stacked=stacked,
        body=_body,
        express=lambda model: _express(model, name, **fixed),
        entries=_entries,
        suits=lambda model, mixers: mixers == {parts.ATTENTION},
        aliases={"num_experts": "num_local_experts"},
    )


GRANITE_MOE = _architecture(
    *(ALONE, "granitemoe", "attention and Granite 3's multipliers, experts in every layer"),
    *({"shared_intermediate_size": 0},),
    shared_hidden=0,
)
GRANITE_MOE_SHARED = _architecture(
    *(SHARED, "granitemoeshared", "the same beside a shared expert without a gate", {}),
)
