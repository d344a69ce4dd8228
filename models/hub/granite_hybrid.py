"""Granite 4: Mamba-2 and attention, with or without positions, SwiGLU, in some beside experts; and Granite 3's
factors."""

from models.ffn import SwiGLU
from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, node
from models.hub.bamba import (
    SSM_DEFAULTS,
    SSM_FIXED,
    SSM_KINDS,
    attention_keys,
    ssm,
    ssm_fits,
    ssm_keys,
    ssm_rows,
)
from models.hub.decoder import changed, only_dense, rotates
from models.hub.granite import KINDS, MULTIPLIERS, folded, folded_attention, folded_ends, ones
from models.hub.granite_moe import chosen_fit, expert_keys, expert_rows, experts, shared_rows, stacked, unstacked
from models.hub.mamba2 import MIXER
from models.hub.rows import Entries
from models.hub.values import WORDS, Kind, optional, shown
from models.hub.values import whole as count
from models.mixers.mamba2 import Mamba2
from models.positions import NoPE

NAME = "GraniteMoeHybridForCausalLM"
ATTENDS = {"attention": True, "full_attention": True, "mamba": False, "linear_attention": False}  # by a layer's type
POSITIONS = Kind("rope, or null", lambda v: v is None or v == "rope")


def _attends(config: Config) -> list[bool]:
    """Says of each layer whether it is attention. Raises ValueError for types that are none."""
    number, types = config["num_hidden_layers"], config["layer_types"]
    if types is None:
        return [False] * number
    if len(types) != number or set(types) - ATTENDS.keys():
        raise ValueError(f"config.json: layer_types={shown(types)}: must be {number} of {', '.join(ATTENDS)}")
    return [ATTENDS[each] for each in types]


def _body(config: Config) -> Node:
    eps, shared = config["rms_norm_eps"], config["shared_intermediate_size"]
    attention = parts.attention(config)
    if config["position_embedding_type"] is None:
        attention["positions"] = node(NoPE, partial=False)
    if config["num_local_experts"]:
        ffn = parts.mixture(experts(config), shared_hidden=shared, shared_gate=False)
    else:
        ffn = node(SwiGLU, hidden=shared)
    blocks = {name: parts.block(mixer, ffn, eps) for name, mixer in (("attn", attention), ("mamba", ssm(config)))}
    return folded(config, parts.stack(config, ["attn" if a else "mamba" for a in _attends(config)], blocks, eps))


def _express(model: Node) -> Config:
    mixers = [section["mixer"] for _, section in layers(model)]
    attention = [mixer["_target_"] == parts.ATTENTION for mixer in mixers]
    rotary = [rotates({"positions": None} | m) for m, attends in zip(mixers, attention, strict=True) if attends]
    if rotary and not any(rotary):
        model = changed(model, lambda mixer: {"positions": None})
    keys = attention_keys(model, NAME, partial=False)
    eps = {"rms_norm_eps": parts.eps_of(model, NAME, {MIXER: Mamba2})}
    if any((section["ffn"] or {}).get("_target_") == parts.MIXTURE for _, section in layers(model)):
        ffn = expert_keys(model, NAME)
        if not ffn["shared_intermediate_size"]:
            raise ValueError(f"model.blocks: shared_hidden=0 of experts: must be above 0 for {NAME}")
    else:
        hidden = only_dense(model, NAME)["intermediate_size"]
        ffn = {"num_local_experts": 0, "shared_intermediate_size": hidden, "intermediate_size": hidden}
    return {
        **parts.shapes(model, NAME),
        **eps,
        **keys,
        **{"mamba_n_heads": 1, **ssm_keys(model, NAME)},
        **ones(keys),
        **ffn,
        "position_embedding_type": "rope" if any(rotary) else None,
        "layer_types": ["attention" if each else "mamba" for each in attention],
    }


def _entries(config: Config) -> Entries:
    D, residual = config["hidden_size"], config["residual_multiplier"]
    rows = folded_ends(config, parts.ends(config))
    for i, attends in enumerate(_attends(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        mixer = f"{ours}.mixer"
        rows |= parts.norms(i, D)
        if attends:
            own = parts.attention_rows(mixer, f"{theirs}.self_attn", config)
            rows |= folded_attention(mixer, config, own)
        else:
            rows |= ssm_rows(mixer, f"{theirs}.mamba", config, residual)
        if config["num_local_experts"]:
            rows |= expert_rows(f"{ours}.ffn", theirs, config)
        else:
            rows |= shared_rows(f"{ours}.ffn", f"{theirs}.shared_mlp", config)
    return rows


def _fits(config: Config) -> None:
    parts.heads_fit(config)
    ssm_fits(config)
    if config["num_local_experts"]:
        chosen_fit(config)


GRANITE_HYBRID = Architecture(
    name=NAME,
    kind="granitemoehybrid",
    about="Granite 4: Mamba-2 and attention, SwiGLU, as in Granite 3, in some beside experts",
    mixers=frozenset({parts.ATTENTION, MIXER}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
        **SSM_DEFAULTS,
        **dict.fromkeys(MULTIPLIERS, 1.0),
        "intermediate_size": 11_008,
        "shared_intermediate_size": 1024,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "position_embedding_type": None,
        "layer_types": None,
    },
    fixed={"hidden_act": "silu", "attention_bias": False, **SSM_FIXED},
    kinds={
        **parts.HEADS,
        **SSM_KINDS,
        **KINDS,
        "num_local_experts": count(0),
        "num_experts_per_tok": count(),
        "shared_intermediate_size": count(),
        "position_embedding_type": POSITIONS,
        "layer_types": optional(WORDS),
    },
    fits=_fits,
    unstacked=unstacked,
    stacked=stacked,
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: parts.ATTENTION in mixers and mixers <= {parts.ATTENTION, MIXER},
    aliases={"layers_block_type": "layer_types", "num_experts": "num_local_experts"},
)
