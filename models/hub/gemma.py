"""Gemma (2403.08295), Gemma 2 (2408.00118), VaultGemma and the text part of Gemma 3 (2503.19786): GeGLU, a scaled
embedding, norms that keep their weights about zero. The second and the third have windows and caps, the second norms
before and behind, too, as the last, whose layers with a window rotate by a base of their own."""

import math
from typing import Any

from models.ffn import SwiGLU
from models.hub import decoder
from models.hub import layers as parts
from models.hub.architecture import Config, Node, node
from models.hub.rows import ABOUT_ZERO, Entries
from models.hub.values import ABOVE_ZERO, FLAG, WORDS, Kind, optional
from models.hub.values import whole as count

FIRST, SECOND, THIRD = "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"
VAULT = "VaultGemmaForCausalLM"
TANH = "gelu_pytorch_tanh"
ACTIVATION = Kind(f"{TANH}, gelu, which means the same here, or null", lambda v: v in (TANH, "gelu", None))
CAUSAL = Kind("false, or null", lambda v: v in (False, None))
KINDS = {
    **parts.HEADS,
    **dict.fromkeys(("hidden_act", "hidden_activation"), ACTIVATION),
    "attention_bias": FLAG,
    "use_bidirectional_attention": CAUSAL,
}


def _scale(config: Config) -> float:
    return math.sqrt(config["hidden_size"])


def _ffn(config: Config) -> Node:
    return node(SwiGLU, hidden=config["intermediate_size"], activation="gelu_tanh")


def _attention(config: Config, **values: Any) -> Node:
    bias = config["attention_bias"]
    return parts.attention(config, norm_eps=config["rms_norm_eps"], qkv_bias=bias, out_bias=bias, **values)


def _common(model: Node) -> dict[str, Any]:
    """Arguments of `decoder.express`."""
    bias = decoder.first(model, "qkv_bias")
    scale = math.sqrt(model["dim"])
    return {"activation": "gelu_tanh", "embedding_scale": scale, "qkv_bias": bias, "out_bias": bias}


def _rows(ours: str, theirs: str, config: Config, **values: Any) -> Entries:
    bias = config["attention_bias"]
    return parts.attention_rows(ours, theirs, config, bias=bias, out_bias=bias, **values)


def _express(model: Node) -> Config:
    keys = decoder.express(model, FIRST, window=None, **_common(model))
    del keys["sliding_window"]
    more = {"hidden_act": TANH, "attention_bias": decoder.first(model, "qkv_bias"), "pad_token_id": None}
    return keys | more


GEMMA = decoder.architecture(
    FIRST,
    "gemma",
    about="as Llama, with GeGLU, a scaled embedding, and norms that keep their weights about zero",
    defaults={
        **decoder.USUAL,
        **{"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True},
        "attention_bias": False,
    },
    fixed={},
    kinds=KINDS,
    body=lambda config: decoder.alike(config, _attention(config), _ffn(config), embedding_scale=_scale(config)),
    express=_express,
    entries=decoder.entries(_rows, form=ABOUT_ZERO),
)


# --- Gemma 2 and VaultGemma

VAULT_NORMS = {"mixer_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
WINDOWS: dict[str, Kind] = {"sliding_window": count(), "layer_types": optional(WORDS)}
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def _scalar(scale: float | None, width: int, who: str) -> int:
    """`query_pre_attn_scalar` of a factor of the scores. Raises ValueError for one that is the root of no whole
    number's inverse."""
    scalar = width if scale is None else scale**-2
    if not math.isclose(scalar, round(scalar), rel_tol=1e-9):
        raise ValueError(
            f"model.blocks: scale of attention={scale}: must be the inverse root of a whole number for {who}"
        )
    return round(scalar)


def _second_body(config: Config, norms: str) -> Node:
    flags, bias = decoder.windows(config, lambda i: i % 2 == 0), config["attention_bias"]
    values = {"qkv_bias": bias, "out_bias": bias, "scale": config["query_pre_attn_scalar"] ** -0.5}
    plain = parts.attention(config, softcap=config["attn_logit_softcapping"], **values)
    mixers = {False: ("attn", plain), True: ("window", {**plain, "window": config["sliding_window"]})}
    more = {"embedding_scale": _scale(config), "logit_softcap": config["final_logit_softcapping"]}
    return decoder.body(config, [mixers[each] for each in flags], _ffn(config), norms=norms, **more)


def _second_express(model: Node, who: str, norms: str) -> Config:
    scale, cap = decoder.first(model, "scale"), decoder.first(model, "softcap")
    same = decoder.changed(model, lambda mixer: {"window": None})
    keys = decoder.express(same, who, norms=norms, scale=scale, softcap=cap, **_common(model))
    keys |= decoder.window_keys(model, who)
    del keys["use_sliding_window"]
    caps = dict(zip(CAPS, (cap, model.get("logit_softcap")), strict=True))
    more = {"hidden_activation": TANH, "attention_bias": decoder.first(model, "qkv_bias"), "pad_token_id": None}
    scalar = {"query_pre_attn_scalar": _scalar(scale, keys["head_dim"], who)}
    return decoder.with_window(keys) | caps | scalar | more


def _second(name: str, kind: str, norms: str, names: dict[str, str], about: str) -> Any:
    return decoder.architecture(
        name,
        kind,
        about=about,
        defaults={
            **decoder.USUAL,
            **{"num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True},
            **{"attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None},
            **dict(zip(CAPS, (50.0, 30.0), strict=True)),
        },
        fixed={},
        kinds={
            **KINDS,
            **WINDOWS,
            **{"query_pre_attn_scalar": ABOVE_ZERO, **dict.fromkeys(CAPS, optional(ABOVE_ZERO))},
        },
        fits=lambda config: parts.heads_fit(config, divided=True),
        body=lambda config: _second_body(config, norms),
        express=lambda model: _second_express(model, name, norms),
        entries=decoder.entries(_rows, norms=names, form=ABOUT_ZERO),
        beyond=frozenset({"logit_softcap"}),
    )


GEMMA2 = _second(
    *(SECOND, "gemma2", "both", decoder.BOTH),
    about="as Gemma, with caps of scores and logits, norms before and behind, a window in every other layer",
)
VAULT_GEMMA = _second(
    *(VAULT, "vaultgemma", "pre", VAULT_NORMS),
    about="as Gemma 2, without norms behind",
)


# --- Gemma 3


def _third_body(config: Config) -> Node:
    every = config["sliding_window_pattern"]
    flags = decoder.windows(config, lambda i: (i + 1) % every != 0)
    scale = config["query_pre_attn_scalar"] ** -0.5
    mixers = decoder.by_window(config, _attention, base=1e6, local_base=1e4, qk_norm=True, scale=scale)
    mixers_by_layer = [mixers[each] for each in flags]
    return decoder.body(config, mixers_by_layer, _ffn(config), norms="both", embedding_scale=_scale(config))


def _third_express(model: Node) -> Config:
    scale = decoder.first(model, "scale")
    keys = decoder.express_by_window(model, THIRD, norms="both", qk_norm=True, scale=scale, **_common(model))
    more = {"hidden_activation": TANH, "attention_bias": decoder.first(model, "qkv_bias"), "pad_token_id": None}
    return decoder.with_window(keys) | {"query_pre_attn_scalar": _scalar(scale, keys["head_dim"], THIRD)} | more


GEMMA3 = decoder.architecture(
    THIRD,
    "gemma3_text",
    about="the text part: as Gemma, with `qk_norm`, norms before and behind, and windows with a base of their own",
    defaults={
        **decoder.USUAL,
        **{"num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072, "tie_word_embeddings": True},
        **{"attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None},
        "sliding_window_pattern": 6,
    },
    fixed={"final_logit_softcapping": None, "attn_logit_softcapping": None},
    kinds={
        **KINDS,
        **{"query_pre_attn_scalar": ABOVE_ZERO, "sliding_window": count(), "layer_types": optional(WORDS)},
        **{"sliding_window_pattern": count(), "rope_local_base_freq": ABOVE_ZERO},
    },
    body=_third_body,
    express=_third_express,
    entries=decoder.entries(
        lambda ours, theirs, config: _rows(ours, theirs, config, norm=ABOUT_ZERO), norms=decoder.BOTH, form=ABOUT_ZERO
    ),
    aliases={"_sliding_window_pattern": "sliding_window_pattern"},
)
