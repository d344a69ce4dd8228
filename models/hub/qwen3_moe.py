"""Qwen3-MoE (2505.09388): attention with normalised queries and keys, then experts, or SwiGLU in some layers."""

from models.ffn import SwiGLU
from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, node
from models.hub.rows import PLAIN, Entries
from models.hub.values import FLAG, optional, whole
from models.mixers.attention import Attention

NAME = "Qwen3MoeForCausalLM"


def _body(config: Config) -> Node:
    eps = config["rms_norm_eps"]
    window = config["sliding_window"] if config["use_sliding_window"] else None
    mixer = parts.attention(config, qk_norm=True, window=window, norm_eps=eps)
    blocks = {
        "moe": parts.block(mixer, parts.mixture(config), eps),
        "dense": parts.block(mixer, node(SwiGLU, hidden=config["intermediate_size"]), eps),
    }
    return parts.stack(config, ["moe" if each else "dense" for each in parts.sparse(config)], blocks, eps)


def _express(model: Node) -> Config:
    keys = parts.attention_keys(model, NAME, qk_norm=True, gate=False)
    experts = parts.ffn_keys(model, NAME, shared_hidden=0)
    experts.pop("shared_expert_intermediate_size", None)
    eps = parts.eps_of(model, NAME, {parts.ATTENTION: Attention})
    return (
        parts.shapes(model, NAME)
        | {"rms_norm_eps": eps}
        | keys
        | experts
        | {"use_sliding_window": keys["sliding_window"] is not None}
    )


def _entries(config: Config) -> Entries:
    rows, D = parts.ends(config), config["hidden_size"]
    for i, sparse in enumerate(parts.sparse(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows |= parts.norms(i, D)
        rows |= parts.attention_rows(f"{ours}.mixer", f"{theirs}.self_attn", config, norm=PLAIN)
        if sparse:
            rows |= parts.mixture_rows(f"{ours}.ffn", f"{theirs}.mlp", config)
        else:
            rows |= parts.dense_rows(f"{ours}.ffn", f"{theirs}.mlp", config["intermediate_size"], D)
    return rows


def _fits(config: Config) -> None:
    parts.heads_fit(config)
    parts.experts_fit(config)


def _suits(model: Node, mixers: set[str]) -> bool:
    """Accepts attention alone that is no Llama, without a gate, which would be Qwen3-Next's."""
    return mixers == {parts.ATTENTION} and not any(block["mixer"].get("gate") for _, block in layers(model))


QWEN3_MOE = Architecture(
    name=NAME,
    kind="qwen3_moe",
    about="attention with `qk_norm`, experts, in some layers SwiGLU (`model=qwen3_moe_tiny`)",
    mixers=frozenset({parts.ATTENTION}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
    },
    fixed={"hidden_act": "silu", "attention_bias": False},
    kinds=parts.HEADS | parts.EXPERTS | {"use_sliding_window": FLAG, "sliding_window": optional(whole())},
    fits=_fits,
    unstacked=parts.unstacked,
    body=_body,
    express=_express,
    entries=_entries,
    suits=_suits,
    aliases={"num_local_experts": "num_experts"},
)
