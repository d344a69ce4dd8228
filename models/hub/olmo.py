"""Norms of what is added to the residual stream, and of queries and keys over all heads: OLMo-2 (2501.00656), OLMo-3;
OLMoE (2409.02060) has the latter alone. Exaone-4 (2507.11407) has the former, and windows in most layers, which alone
rotate."""

from typing import Any

from models.hub import decoder
from models.hub import layers as parts
from models.hub.architecture import Config, Node, node
from models.hub.rows import PLAIN, Entries
from models.hub.values import FLAG, WORDS, Kind, optional
from models.hub.values import whole as count
from models.mixers.attention import Attention
from models.positions import NoPE

OLMO2_NAME, OLMO3_NAME, OLMOE_NAME, EXAONE_NAME = (
    f"{name}ForCausalLM" for name in ("Olmo2", "Olmo3", "Olmoe", "Exaone4")
)
JOINT: dict[str, Any] = {"qk_norm": True, "norm_heads": "all"}
BIASED = {"attention_bias": FLAG}  # of all four projections


def _attention(config: Config, **values: Any) -> Node:
    bias = config["attention_bias"]
    return parts.attention(config, norm_eps=config["rms_norm_eps"], qkv_bias=bias, out_bias=bias, **values)


def _biases(model: Node) -> tuple[Config, Config]:
    """The attention's flags, which must agree, and the key that says them."""
    bias = decoder.first(model, "qkv_bias")
    return {"qkv_bias": bias, "out_bias": bias}, {"attention_bias": bias}


def _joint_rows(ours: str, theirs: str, config: Config) -> Entries:
    bias = config["attention_bias"]
    return parts.attention_rows(ours, theirs, config, norm=PLAIN, joint=True, bias=bias, out_bias=bias)


# --- OLMo-2


def _olmo2_express(model: Node) -> Config:
    flags, key = _biases(model)
    keys = decoder.express(model, OLMO2_NAME, norms="post", window=None, **JOINT, **flags)
    del keys["sliding_window"]
    return keys | key | {"pad_token_id": None}


OLMO2 = decoder.architecture(
    OLMO2_NAME,
    "olmo2",
    about="attention with norms of q and k over all heads, SwiGLU, norms behind both",
    defaults=decoder.USUAL | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "attention_bias": False},
    fixed={"hidden_act": "silu"},
    kinds=parts.HEADS | BIASED,
    body=lambda config: decoder.alike(config, _attention(config, **JOINT), norms="post"),
    express=_olmo2_express,
    entries=decoder.entries(_joint_rows, norms=decoder.POST),
)


# --- OLMo-3: windows in most layers, and a rule of positions for each of the two kinds


def _olmo3_body(config: Config) -> Node:
    flags = decoder.windows(config, lambda i: (i + 1) % 4 != 0)
    mixers = decoder.by_window(config, _attention, base=500_000.0, **JOINT)
    return decoder.body(config, [mixers[each] for each in flags], norms="post")


def _olmo3_express(model: Node) -> Config:
    flags, key = _biases(model)
    keys = decoder.express_by_window(model, OLMO3_NAME, norms="post", **JOINT, **flags)
    return decoder.with_window(keys) | key | {"pad_token_id": None}


OLMO3 = decoder.architecture(
    OLMO3_NAME,
    "olmo3",
    about="as OLMo-2, a window in most layers; a rule of positions for layers with a window and one for the others",
    defaults={
        **decoder.USUAL,
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "attention_bias": False},
        **{"sliding_window": 4096, "layer_types": None},
    },
    fixed={"hidden_act": "silu"},
    kinds=parts.HEADS | BIASED | {"sliding_window": count(), "layer_types": optional(WORDS)},
    body=_olmo3_body,
    express=_olmo3_express,
    entries=decoder.entries(_joint_rows, norms=decoder.POST),
)


# --- OLMoE


def _olmoe_body(config: Config) -> Node:
    return decoder.alike(config, _attention(config, **JOINT), parts.mixture(_experts(config)))


def _experts(config: Config) -> Config:
    """The same under the names that other mixtures have."""
    return config | {"moe_intermediate_size": config["intermediate_size"]}


def _olmoe_express(model: Node) -> Config:
    flags, key = _biases(model)
    keys = parts.attention_keys(model, OLMOE_NAME, gate=False, window=None, **JOINT, **flags)
    del keys["sliding_window"]
    experts = parts.only_experts(model, OLMOE_NAME, shared_hidden=0)
    experts["intermediate_size"] = experts.pop("moe_intermediate_size")
    eps = {"rms_norm_eps": parts.eps_of(model, OLMOE_NAME, {parts.ATTENTION: Attention})}
    return parts.shapes(model, OLMOE_NAME) | eps | keys | experts | key | {"pad_token_id": None}


def _olmoe_fits(config: Config) -> None:
    parts.heads_fit(config, divided=True)
    parts.experts_fit(config)


OLMOE = decoder.architecture(
    OLMOE_NAME,
    "olmoe",
    about="attention with norms of q and k over all heads, experts in every layer",
    defaults={
        **decoder.USUAL,
        **{"intermediate_size": 2048, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        **{"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False, "attention_bias": False},
    },
    fixed={"hidden_act": "silu", "clip_qkv": None},
    kinds={
        **parts.HEADS,
        **BIASED,
        **{key: parts.EXPERTS[key] for key in ("num_experts", "num_experts_per_tok", "norm_topk_prob")},
    },
    fits=_olmoe_fits,
    unstacked=parts.unstacked,
    body=_olmoe_body,
    express=_olmoe_express,
    entries=decoder.entries(
        _joint_rows, lambda ours, theirs, config, layer: parts.mixture_rows(ours, theirs, _experts(config))
    ),
)


# --- Exaone-4

PATTERN = Kind("a whole number, a word of L and G, or null", lambda v: v is None or count(0).holds(v) or _pattern(v))


def _pattern(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not set(value) - {"L", "G"}


def _exaone_body(config: Config) -> Node:
    every = config["sliding_window_pattern"] or 0
    if isinstance(every, str):
        flags = decoder.windows(config, lambda i: every[i % len(every)] == "L")
    else:
        flags = decoder.windows(config, lambda i: bool(every) and (i + 1) % every != 0)
    near = parts.attention(config, qk_norm=True, norm_eps=config["rms_norm_eps"])
    far = near if config["sliding_window"] is None else {**near, "positions": node(NoPE, partial=False)}
    near = {**near, "window": config["sliding_window"]}
    return decoder.body(config, [("window", near) if each else ("attn", far) for each in flags], norms="post")


def _exaone_express(model: Node) -> Config:
    """Layers without a window have no positions where others have one."""
    mixers = [mixer for _, mixer in decoder.attentions(model)]
    rope = next((mixer["positions"] for mixer in mixers if mixer["window"] is not None), None)
    wide = [mixer for mixer in mixers if mixer["window"] is None]
    if len(wide) < len(mixers) and any(decoder.rotates(mixer) for mixer in wide):
        raise ValueError(
            f"model.blocks: positions of layers without a window must be NoPE for {EXAONE_NAME}, beside others with one"
        )

    def change(mixer: Node) -> Node:
        return {"window": None, "positions": rope if len(wide) < len(mixers) else mixer["positions"]}

    keys = decoder.express(decoder.changed(model, change), EXAONE_NAME, norms="post", qk_norm=True)
    return keys | decoder.window_keys(model, EXAONE_NAME) | {"sliding_window_pattern": 4}


EXAONE4 = decoder.architecture(
    EXAONE_NAME,
    "exaone4",
    about="attention with `qk_norm`, SwiGLU, norms behind both; layers with a window, and others without positions",
    defaults={
        **decoder.USUAL,
        **{"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
        **{"sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None},
    },
    fixed={"hidden_act": "silu"},
    kinds={
        **parts.HEADS,
        **{"sliding_window": optional(count()), "layer_types": optional(WORDS)},
        "sliding_window_pattern": PATTERN,
    },
    body=_exaone_body,
    express=_exaone_express,
    entries=decoder.entries(
        lambda ours, theirs, config: parts.attention_rows(ours, theirs, config, norm=PLAIN), norms=decoder.POST
    ),
)
