"""Transformers of attention and SwiGLU that differ from Llama in few things: Qwen3 (2505.09388), Mistral (2310.06825),
SmolLM3, Phi-3 (2404.14219) and ERNIE-4.5.

Legend: H heads, G heads of keys and values, K head width.
"""

from models.hub import layers as parts
from models.hub.architecture import Config, Node, layers, node, with_defaults
from models.hub.decoder import (
    USUAL,
    WINDOWS,
    alike,
    architecture,
    body,
    by_row_fits,
    changed,
    entries,
    express,
    fused,
    rotates,
    window_keys,
    windows,
)
from models.hub.rows import PLAIN, Entries, ParameterSource, PublishedRows, whole
from models.hub.values import WORDS, listed, optional, shown
from models.hub.values import whole as count
from models.mixers.attention import Attention
from models.positions import NoPE

# --- Mistral: one window for all layers, or none

MISTRAL = architecture(
    "MistralForCausalLM",
    "mistral",
    about="as Llama, with a window for all layers or none",
    defaults=USUAL | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    fixed={"hidden_act": "silu"},
    kinds=parts.HEADS | {"sliding_window": optional(count())},
    body=lambda config: alike(config, parts.attention(config, window=config["sliding_window"])),
    express=lambda model: express(model, "MistralForCausalLM"),
    entries=entries(parts.attention_rows),
)


# --- Qwen3: normalised queries and keys, a window in the last layers


def _qwen3_body(config: Config) -> Node:
    plain = parts.attention(config, qk_norm=True, norm_eps=config["rms_norm_eps"])
    windowed = {**plain, "window": config["sliding_window"]}
    windows_by_layer = windows(config, lambda i: i >= config["max_window_layers"])
    return body(config, [("window", windowed) if each else ("attn", plain) for each in windows_by_layer])


def _qwen3_express(model: Node) -> Config:
    name = "Qwen3ForCausalLM"
    keys = express(changed(model, lambda mixer: {"window": None}), name, qk_norm=True)
    return keys | window_keys(model, name)


QWEN3 = architecture(
    "Qwen3ForCausalLM",
    "qwen3",
    about="attention with `qk_norm`, a window in some layers or none, and SwiGLU",
    defaults={
        **USUAL,
        **{"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
        **{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None},
    },
    fixed={"hidden_act": "silu", "attention_bias": False},
    kinds=parts.HEADS | WINDOWS | {"max_window_layers": count(0), "layer_types": optional(WORDS)},
    body=_qwen3_body,
    express=_qwen3_express,
    entries=entries(lambda ours, theirs, config: parts.attention_rows(ours, theirs, config, norm=PLAIN)),
)


# --- SmolLM3: no positions in every fourth layer


def _ropes(config: Config) -> list[bool]:
    """Says of each layer whether it rotates. Raises ValueError for fewer flags than layers."""
    number, flags = config["num_hidden_layers"], config["no_rope_layers"]
    if flags is None:
        return [(i + 1) % config["no_rope_layer_interval"] != 0 for i in range(number)]
    if len(flags) < number or set(flags) - {0, 1}:
        raise ValueError(f"config.json: no_rope_layers={shown(flags)}: must be {number} of 0, 1")
    return [bool(flag) for flag in flags[:number]]


def _smollm3_body(config: Config) -> Node:
    plain, ropes = parts.attention(config), _ropes(config)
    keys = []
    for rope, window in zip(ropes, windows(config, lambda i: not ropes[i]), strict=True):
        positions = plain["positions"] if rope else node(NoPE, partial=False)
        mixer = {**plain, "positions": positions, "window": config["sliding_window"] if window else None}
        keys.append((("attn" if rope else "nope") + ("_window" if window else ""), mixer))
    return body(config, keys)


def _smollm3_express(model: Node) -> Config:
    """Layers without positions are told by their flags, and then say what the others do."""
    name = "SmolLM3ForCausalLM"
    mixers = [with_defaults(section["mixer"], Attention) for _, section in layers(model)]
    rotary = next((mixer["positions"] for mixer in mixers if rotates(mixer)), None)

    def change(mixer: Node) -> Node:
        return {"window": None, "positions": mixer["positions"] if rotates(mixer) else rotary}

    keys = express(changed(model, change), name) | window_keys(model, name)
    return keys | {"no_rope_layers": [int(rotates(mixer)) for mixer in mixers], "pad_token_id": None}


SMOLLM3 = architecture(
    "SmolLM3ForCausalLM",
    "smollm3",
    about="as Llama, layers without positions, and a window in some or none",
    defaults={
        **USUAL,
        **{"num_key_value_heads": 4, "max_position_embeddings": 32_768, "tie_word_embeddings": True},
        **{"use_sliding_window": False, "sliding_window": None, "layer_types": None},
        **{"no_rope_layers": None, "no_rope_layer_interval": 4, "rope_theta": 2_000_000.0},
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    kinds={
        **parts.HEADS,
        **WINDOWS,
        "layer_types": optional(WORDS),
        "no_rope_layers": optional(listed(count(0), "0 and 1")),
        "no_rope_layer_interval": count(),
    },
    body=_smollm3_body,
    express=_smollm3_express,
    entries=entries(parts.attention_rows),
)


# --- Phi-3: queries, keys and values in one tensor, gates and values in another


def _phi3_rows(ours: str, theirs: str, config: Config) -> Entries:
    H = config["num_attention_heads"]
    G = config["num_key_value_heads"] or H
    K = config["head_dim"] or config["hidden_size"] // H
    source = f"{theirs}.qkv_proj.weight"
    kv = tuple(PublishedRows(source, (H + part * G + g) * K, K) for g in range(G) for part in (0, 1))
    return {
        f"{ours}.q.weight": ParameterSource((PublishedRows(source, 0, H * K),)),
        f"{ours}.kv.weight": ParameterSource(kv),
        f"{ours}.out.weight": whole(f"{theirs}.o_proj.weight", config["hidden_size"]),
    }


def _phi3_fits(config: Config) -> None:
    """Its reader knows no other rules than its own two, and takes YaRN for one of them."""
    parts.heads_fit(config)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: rope_type={shown(kind)}: must be default for Phi3ForCausalLM")


PHI3 = architecture(
    "Phi3ForCausalLM",
    "phi3",
    about="as Mistral, a share of each head rotated; plain rotary positions only",
    defaults=USUAL | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None},
    fixed={"hidden_act": "silu"},
    kinds=parts.HEADS | {"sliding_window": optional(count())},
    fits=_phi3_fits,
    body=lambda config: alike(config, parts.attention(config, fraction=1.0, window=config["sliding_window"])),
    express=lambda model: express(model, "Phi3ForCausalLM", partial=True) | {"pad_token_id": None},
    entries=entries(_phi3_rows, fused),
)


# --- ERNIE-4.5: pairs of rotated channels lie side by side


def ernie_rows(ours: str, theirs: str, config: Config) -> Entries:
    width = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    return parts.attention_rows(ours, theirs, config, interleaved=width)


def _ernie_express(model: Node) -> Config:
    keys = express(model, "Ernie4_5ForCausalLM", window=None)
    del keys["sliding_window"]
    return keys


ERNIE = architecture(
    "Ernie4_5ForCausalLM",
    "ernie4_5",
    about="the dense ones: as Llama, rotated channels in another order",
    defaults={
        **USUAL,
        **{"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 131_072, "tie_word_embeddings": True, "rope_theta": 500_000.0},
    },
    fixed={"hidden_act": "silu", "use_bias": False},
    kinds=parts.HEADS,
    fits=by_row_fits,
    body=lambda config: alike(config, parts.attention(config)),
    express=_ernie_express,
    entries=entries(ernie_rows),
)
