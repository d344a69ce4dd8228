"""Qwen3.5, the text part: the layers of Qwen3-Next, each projection of Gated DeltaNet in a tensor of its own, and
SwiGLU or experts in all of them. Folders of the whole model have the text under another prefix, and pictures beside it.

Legend: H heads of keys, N heads of values, K and V their widths.
"""

from typing import Any

from models.hub import layers as parts
from models.hub import qwen3_next as older
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, must
from models.hub.mtp import beside_the_model
from models.hub.rows import ABOUT_ZERO, TAPS, Entries, ParameterSource, PublishedRows, whole
from models.hub.tensors import StoredTensor
from models.hub.values import WORDS, optional
from models.hub.values import whole as count

DENSE, SPARSE = "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"
LINEAR = {name: older.QWEN3_NEXT.defaults[name] for name in older.LINEAR}
USUAL: Config = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
    **LINEAR,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "layer_types": None,
    "full_attention_interval": 4,
}


def _older(config: Config) -> Config:
    """The same in the words of Qwen3-Next, for which no layers are dense among experts."""
    every = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return {**older.QWEN3_NEXT.defaults, "num_experts": 0, **config, **every}


def _delta_rows(ours: str, theirs: str, config: Config) -> Entries:
    H, N = config["linear_num_key_heads"], config["linear_num_value_heads"]
    K, V, D = config["linear_key_head_dim"], config["linear_value_head_dim"], config["hidden_size"]
    width = 2 * H * K + N * V
    rates = (PublishedRows(f"{theirs}.in_proj_{part}.weight", n, 1) for n in range(N) for part in ("a", "b"))
    return {
        f"{ours}.qkv.weight": whole(f"{theirs}.in_proj_qkv.weight", width),
        f"{ours}.gate.weight": whole(f"{theirs}.in_proj_z.weight", N * V),
        f"{ours}.rates.weight": ParameterSource(tuple(rates)),
        f"{ours}.conv.weight": whole(f"{theirs}.conv1d.weight", width, TAPS),
        f"{ours}.A_log": whole(f"{theirs}.A_log", N),
        f"{ours}.dt_bias": whole(f"{theirs}.dt_bias", N),
        f"{ours}.norm.weight": whole(f"{theirs}.norm.weight", V),
        f"{ours}.out.weight": whole(f"{theirs}.out_proj.weight", D),
    }


def _entries(config: Config) -> Entries:
    rows, D, full = parts.ends(config, norm=ABOUT_ZERO), config["hidden_size"], _older(config)
    for i, kind in enumerate(older.types(full)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows |= parts.norms(i, D, ABOUT_ZERO)
        if kind == "full_attention":
            names = f"{ours}.mixer", f"{theirs}.self_attn"
            rows |= parts.attention_rows(*names, full, gate=True, norm=ABOUT_ZERO)
        else:
            rows |= _delta_rows(f"{ours}.mixer", f"{theirs}.linear_attn", config)
        if full["num_experts"]:
            rows |= parts.mixture_rows(f"{ours}.ffn", f"{theirs}.mlp", full)
            rows |= parts.shared_rows(f"{ours}.ffn", f"{theirs}.mlp", full)
        else:
            rows |= parts.dense_rows(f"{ours}.ffn", f"{theirs}.mlp", config["intermediate_size"], D)
    return rows


def _express(model: Node, who: str, kind: str) -> Config:
    """kind: the class of all feed-forwards, as `_target_` names it."""
    for name, section in layers(model):
        ffn = section["ffn"] or {"_target_": "null"}
        must(f"model.blocks.{name}.ffn", ffn, {"_target_": kind}, who)
    keys = older.express(model, who)
    renormalise = keys.pop("norm_topk_prob", True)
    if not renormalise:
        raise ValueError(f"model.blocks: ffn.renormalise=false: must be true, as in {who}")
    unknown = {"mlp_only_layers", "decoder_sparse_step"}
    unknown |= {"num_experts"} if kind == parts.DENSE else {"intermediate_size"}
    return {key: value for key, value in keys.items() if key not in unknown}


def _fits(config: Config) -> None:
    older.fits(_older(config))


def _text(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The text's tensors under the names that they have alone, its experts one by one."""
    prefix = "model.language_model."
    return parts.unstacked({name.replace(prefix, "model.", 1): each for name, each in stored.items()})


def _architecture(name: str, kind: str, feed_forward: str, **values: Any) -> Architecture:
    return Architecture(
        name=name,
        kind=kind,
        mixers=frozenset(older.KINDS),
        fixed={"hidden_act": "silu", "attention_bias": False},
        fits=_fits,
        unstacked=_text,
        body=lambda config: older.body(_older(config)),
        express=lambda model: _express(model, name, feed_forward),
        entries=_entries,
        suits=lambda model, mixers: mixers <= older.KINDS.keys(),
        left_out=("model.visual.",),
        mtp=beside_the_model(
            "mtp_num_hidden_layers",
            {"layer_types": ["full_attention"]},
            ABOUT_ZERO,
            fixed={"mtp_use_dedicated_embeddings": False},
        ),
        **values,
    )


KINDS = {
    **parts.HEADS,
    **dict.fromkeys(LINEAR, count()),
    "layer_types": optional(WORDS),
    "full_attention_interval": count(),
}
QWEN3_5 = _architecture(
    DENSE,
    "qwen3_5_text",
    parts.DENSE,
    about="the text part: Gated DeltaNet and gated attention, SwiGLU",
    defaults=USUAL | {"intermediate_size": 12_288, "num_key_value_heads": 4},
    kinds=KINDS,
)
QWEN3_5_MOE = _architecture(
    SPARSE,
    "qwen3_5_moe_text",
    parts.MIXTURE,
    about="the text part: as Qwen3-Next, experts in every layer",
    defaults={
        **USUAL,
        **{"num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8},
        **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
    },
    kinds={
        **KINDS,
        **dict.fromkeys(("num_experts", "num_experts_per_tok", "moe_intermediate_size"), count()),
        "shared_expert_intermediate_size": count(),
    },
)
# The class of the text part of a model that sees. Its configuration is a table in the whole model's.
WITH_PICTURES = {"Qwen3_5ForConditionalGeneration": QWEN3_5, "Qwen3_5MoeForConditionalGeneration": QWEN3_5_MOE}


def text_of(config: Config) -> Config:
    """The text part's config.json of a whole model's; any other as it is. Raises ValueError where it has none."""
    named = config.get("architectures")
    architecture = (
        WITH_PICTURES.get(named[0]) if isinstance(named, list) and named and isinstance(named[0], str) else None
    )
    if architecture is None:
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ValueError("config.json: text_config: missing")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    beside = {key: config[key] for key in ("quantization_config",) if key in config}
    head = {"architectures": [architecture.name], "model_type": architecture.kind}
    return {**text, **beside, **head, "tie_word_embeddings": tied}
