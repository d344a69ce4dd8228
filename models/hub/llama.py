"""Llama (2407.21783): softmax attention with rotary positions, then SwiGLU, in every layer."""

from models.ffn import SwiGLU
from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, node, one
from models.hub.rows import Entries

NAME = "LlamaForCausalLM"


def _body(config: Config) -> Node:
    eps = config["rms_norm_eps"]
    mixer = parts.attention(config)
    blocks = {"attn": parts.block(mixer, node(SwiGLU, hidden=config["intermediate_size"]), eps)}
    return parts.stack(config, ["attn"] * config["num_hidden_layers"], blocks, eps)


def _express(model: Node) -> Config:
    keys = parts.attention_keys(model, NAME, window=None, qk_norm=False, gate=False)
    del keys["sliding_window"]
    if model["dim"] % keys["num_attention_heads"]:
        raise ValueError(
            f"model.dim={model['dim']}: must be a multiple of {keys['num_attention_heads']} heads for {NAME}"
        )
    places = [(f"model.blocks.{name}.ffn", section["ffn"]) for name, section in layers(model)]
    hidden = one(((f"{path}.hidden", parts.hidden(path, ffn, NAME)) for path, ffn in places), NAME)
    whole = parts.shapes(model, NAME) | {"rms_norm_eps": parts.eps_of(model, NAME)}
    return whole | keys | {"intermediate_size": hidden}


def _entries(config: Config) -> Entries:
    rows, D = parts.ends(config), config["hidden_size"]
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows |= parts.norms(i, D)
        rows |= parts.attention_rows(f"{ours}.mixer", f"{theirs}.self_attn", config)
        rows |= parts.dense_rows(f"{ours}.ffn", f"{theirs}.mlp", config["intermediate_size"], D)
    return rows


def _suits(model: Node, mixers: set[str]) -> bool:
    """Attention and SwiGLU alone; with normalised queries and keys it would be a Qwen3."""
    ffns = {(b["ffn"] or {}).get("_target_") for _, b in layers(model)}
    return mixers == {parts.ATTENTION} and ffns == {parts.DENSE}


LLAMA = Architecture(
    name=NAME,
    kind="llama",
    about="attention and SwiGLU (`model=llama_tiny`, `llama_1b`)",
    mixers=frozenset({parts.ATTENTION}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), REQUIRED),
        **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), REQUIRED),
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    },
    kinds=parts.HEADS,
    fits=lambda config: parts.heads_fit(config, divided=True),
    body=_body,
    express=_express,
    entries=_entries,
    suits=_suits,
    left_out=(".rotary_emb.inv_freq",),
)
