"""GLM-4 (2406.12793) with and without norms behind its parts, and the mixtures of GLM-4.5 (2508.06471): biases of
queries, keys and values, and half of each head rotated."""

from typing import Any

from models.hub import decoder, sigmoid_moe
from models.hub import layers as parts
from models.hub.architecture import Config, Node
from models.hub.mtp import behind_the_layers
from models.hub.rows import PLAIN, Entries
from models.hub.values import FLAG
from models.mixers.attention import Attention

OLDER, NEWER, SPARSE = "GlmForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM"
HALF = 0.5  # of a head that is rotated, where the configuration does not say it
BOTH = {"mixer_norm": "input_layernorm", "mixer_post_norm": "post_self_attn_layernorm"}
BOTH |= {"ffn_norm": "post_attention_layernorm", "ffn_post_norm": "post_mlp_layernorm"}


def _attention(config: Config, **values: Any) -> Node:
    return parts.attention(config, fraction=HALF, qkv_bias=config["attention_bias"], **values)


def _rows(ours: str, theirs: str, config: Config) -> Entries:
    section = _attention(config)
    turned = int(section["head_dim"] * section["positions"]["fraction"])
    return parts.attention_rows(ours, theirs, config, bias=config["attention_bias"], interleaved=turned)


def _express(model: Node, who: str, norms: str) -> Config:
    bias = decoder.first(model, "qkv_bias")
    keys = decoder.express(model, who, partial=True, norms=norms, window=None, qkv_bias=bias)
    del keys["sliding_window"]
    return keys | {"attention_bias": bias, "pad_token_id": None}


def _dense(name: str, kind: str, norms: str, names: dict[str, str], eps: float, about: str) -> Any:
    return decoder.architecture(
        name,
        kind,
        about=about,
        defaults={
            **decoder.USUAL,
            **{"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": eps, "max_position_embeddings": 131_072},
            "attention_bias": True,
        },
        fixed={"hidden_act": "silu"},
        kinds=parts.HEADS | {"attention_bias": FLAG},
        fits=decoder.by_row_fits,
        body=lambda config: decoder.alike(config, _attention(config), norms=norms),
        express=lambda model: _express(model, name, norms),
        entries=decoder.entries(_rows, decoder.fused, norms=names),
    )


GLM = _dense(
    *(OLDER, "glm", "pre", decoder.PRE, 1.5625e-7),
    about="attention with biases of q, k and v, half of each head rotated, SwiGLU",
)
GLM4 = _dense(*(NEWER, "glm4", "both", BOTH, 1.5625e-7), about="as GLM, with norms before and behind")


# --- GLM-4.5


def _sparse_body(config: Config) -> Node:
    mixer = _attention(config, qk_norm=config["use_qk_norm"], norm_eps=config["rms_norm_eps"])
    return sigmoid_moe.body(config, [("attn", mixer)] * config["num_hidden_layers"])


def _sparse_express(model: Node) -> Config:
    bias, norm = decoder.first(model, "qkv_bias"), decoder.first(model, "qk_norm")
    keys = parts.attention_keys(model, SPARSE, partial=True, window=None, gate=False, qkv_bias=bias, qk_norm=norm)
    del keys["sliding_window"]
    eps = {"rms_norm_eps": parts.eps_of(model, SPARSE, {parts.ATTENTION: Attention} if norm else {})}
    more = {"attention_bias": bias, "use_qk_norm": norm}
    return parts.shapes(model, SPARSE) | eps | keys | sigmoid_moe.keys(model, SPARSE) | more


def _sparse_rows(ours: str, theirs: str, config: Config) -> Entries:
    norm = PLAIN if config["use_qk_norm"] else None
    return parts.attention_rows(ours, theirs, config, bias=config["attention_bias"], norm=norm)


def _sparse_fits(config: Config) -> None:
    parts.heads_fit(config)
    sigmoid_moe.fits(config)


GLM4_MOE = decoder.architecture(
    SPARSE,
    "glm4_moe",
    about="GLM-4.5: biases and norms of q, k and v or none, half of each head rotated, experts as DeepSeek-V3's",
    defaults={
        **decoder.USUAL,
        **sigmoid_moe.DEFAULTS,
        **{"intermediate_size": 10_944, "moe_intermediate_size": 1408, "n_routed_experts": 128},
        **{"num_experts_per_tok": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 131_072, "attention_bias": False, "use_qk_norm": False},
    },
    fixed={"hidden_act": "silu"},
    kinds=parts.HEADS | sigmoid_moe.KINDS | {"attention_bias": FLAG, "use_qk_norm": FLAG},
    fits=_sparse_fits,
    unstacked=parts.unstacked,
    body=_sparse_body,
    express=_sparse_express,
    entries=decoder.entries(_sparse_rows, sigmoid_moe.rows),
    mtp=behind_the_layers({"first_k_dense_replace": 0}),
    aliases={"num_mtp_layers": "num_nextn_predict_layers"},
)
