"""Attention whose queries, keys and values have biases: Qwen2 and 2.5 (2412.15115), their mixtures (2407.10671), and
Seed-OSS."""

from models.ffn import SwiGLU
from models.hub import decoder
from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Config, Node, node
from models.hub.rows import Entries
from models.hub.values import FLAG, WORDS, optional
from models.hub.values import whole as count

DENSE, SPARSE, SEED = "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "SeedOssForCausalLM"
WINDOW_DEFAULTS: Config = {"use_sliding_window": False, "sliding_window": 4096, "layer_types": None}
WINDOW_KINDS = {
    "use_sliding_window": FLAG,
    "sliding_window": optional(count(0)),  # a mixture without windows writes 0
    "max_window_layers": count(0),
    "layer_types": optional(WORDS),
}


def _body(config: Config) -> Node:
    plain = parts.attention(config, qkv_bias=True)
    windowed = {**plain, "window": config["sliding_window"]}
    flags = decoder.windows(config, lambda i: i >= config["max_window_layers"])
    return decoder.body(config, [("window", windowed) if each else ("attn", plain) for each in flags])


def _express(model: Node) -> Config:
    keys = decoder.express(decoder.changed(model, lambda mixer: {"window": None}), DENSE, qkv_bias=True)
    return keys | decoder.window_keys(model, DENSE)


QWEN2 = decoder.architecture(
    DENSE,
    "qwen2",
    about="Qwen2 and 2.5: attention with biases of q, k and v, a window in some layers or none, and SwiGLU",
    defaults={
        **decoder.USUAL,
        **WINDOW_DEFAULTS,
        **{"num_key_value_heads": 32, "max_position_embeddings": 32_768, "max_window_layers": 28},
    },
    fixed={"hidden_act": "silu"},
    kinds=parts.HEADS | WINDOW_KINDS,
    body=_body,
    express=_express,
    entries=decoder.entries(lambda ours, theirs, config: parts.attention_rows(ours, theirs, config, bias=True)),
)


# --- Qwen2-MoE: experts beside a gated shared one


def _sparse_windows(config: Config) -> list[bool]:
    return decoder.windows(config, lambda i: i % 2 == 0 and i < config["max_window_layers"])


def _sparse_body(config: Config) -> Node:
    eps, attention = config["rms_norm_eps"], parts.attention(config, qkv_bias=config["qkv_bias"])
    mixers = {False: attention, True: {**attention, "window": config["sliding_window"]}}
    shared = config["shared_expert_intermediate_size"]
    ffns = {
        True: parts.mixture(config, shared_hidden=shared, shared_gate=True),
        False: node(SwiGLU, hidden=config["intermediate_size"]),
    }
    blocks, kinds = {}, []
    for window, sparse in zip(_sparse_windows(config), parts.sparse(config), strict=True):
        kinds.append(("window" if window else "attn") + ("" if sparse else "_dense"))
        blocks[kinds[-1]] = parts.block(mixers[window], ffns[sparse], eps)
    return parts.stack(config, kinds, blocks, eps)


def _sparse_express(model: Node) -> Config:
    bias = decoder.first(model, "qkv_bias")
    plain = decoder.changed(model, lambda mixer: {"window": None})
    keys = parts.attention_keys(plain, SPARSE, qk_norm=False, gate=False, qkv_bias=bias)
    experts = parts.ffn_keys(model, SPARSE, shared_gate=True)
    eps = {"rms_norm_eps": parts.eps_of(model, SPARSE)}
    return parts.shapes(model, SPARSE) | eps | keys | experts | decoder.window_keys(model, SPARSE) | {"qkv_bias": bias}


def _sparse_entries(config: Config) -> Entries:
    rows, D = parts.ends(config), config["hidden_size"]
    for i, sparse in enumerate(parts.sparse(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows |= parts.norms(i, D)
        rows |= parts.attention_rows(f"{ours}.mixer", f"{theirs}.self_attn", config, bias=config["qkv_bias"])
        if sparse:
            rows |= parts.mixture_rows(f"{ours}.ffn", f"{theirs}.mlp", config)
            rows |= parts.shared_rows(f"{ours}.ffn", f"{theirs}.mlp", config)
        else:
            rows |= parts.dense_rows(f"{ours}.ffn", f"{theirs}.mlp", config["intermediate_size"], D)
    return rows


def _sparse_fits(config: Config) -> None:
    parts.heads_fit(config)
    parts.experts_fit(config)


QWEN2_MOE = decoder.architecture(
    SPARSE,
    "qwen2_moe",
    about="attention as in Qwen2, experts beside a gated shared one, in some layers SwiGLU",
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
        **WINDOW_DEFAULTS,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632,
        "num_key_value_heads": 16,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
    },
    fixed={"hidden_act": "silu"},
    kinds={
        **parts.HEADS,
        **parts.EXPERTS,
        **WINDOW_KINDS,
        "shared_expert_intermediate_size": count(),
        "qkv_bias": FLAG,
    },
    fits=_sparse_fits,
    unstacked=parts.unstacked,
    body=_sparse_body,
    express=_sparse_express,
    entries=_sparse_entries,
)


# --- Seed-OSS: a bias of the output, too, where the configuration says so


def _seed_express(model: Node) -> Config:
    biases = {key: decoder.first(model, key) for key in ("qkv_bias", "out_bias")}
    keys = decoder.express(model, SEED, window=None, **biases)
    del keys["sliding_window"]
    return keys | {"attention_bias": biases["qkv_bias"], "attention_out_bias": biases["out_bias"]}


def _seed_rows(ours: str, theirs: str, config: Config) -> Entries:
    biases = {"bias": config["attention_bias"], "out_bias": config["attention_out_bias"]}
    return parts.attention_rows(ours, theirs, config, **biases)


def _seed_body(config: Config) -> Node:
    biases = {"qkv_bias": config["attention_bias"], "out_bias": config["attention_out_bias"]}
    return decoder.alike(config, parts.attention(config, **biases))


SEED_OSS = decoder.architecture(
    SEED,
    "seed_oss",
    about="as Llama, with biases of q, k and v, of the output, or of none",
    defaults={
        **decoder.USUAL,
        **{"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524_288},
        **{"attention_bias": True, "attention_out_bias": False},
    },
    fixed={"hidden_act": "silu", "mlp_bias": False},
    kinds=parts.HEADS | {"attention_bias": FLAG, "attention_out_bias": FLAG},
    body=_seed_body,
    express=_seed_express,
    entries=decoder.entries(_seed_rows),
)
