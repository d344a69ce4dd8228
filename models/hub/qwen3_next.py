"""Qwen3-Next: Gated DeltaNet (2412.06464) in most layers, gated attention (2505.06708) in the others, experts beside a
shared one behind a gate. Its norms keep their weights about zero; that of Gated DeltaNet's output does not.

Legend: H heads of keys, N heads of values, K and V their widths, D model width.
"""

from models.ffn import SwiGLU
from models.hub import layers as parts
from models.hub.architecture import (
    REQUIRED,
    Architecture,
    Config,
    Node,
    layers,
    must,
    node,
    one,
    ratio,
    target,
    with_defaults,
)
from models.hub.mtp import beside_the_model
from models.hub.rows import ABOUT_ZERO, TAPS, Entries, ParameterSource, PublishedRows, whole
from models.hub.values import WORDS, optional
from models.hub.values import whole as count
from models.mixers.attention import Attention
from models.mixers.gated_deltanet import GatedDeltaNet

NAME = "Qwen3NextForCausalLM"
LINEAR = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)
FRACTION = 0.25  # of a head that is rotated, where the configuration does not say it
DELTA = target(GatedDeltaNet)
KINDS = {parts.ATTENTION: "full_attention", DELTA: "linear_attention"}


def types(config: Config) -> list[str]:
    """The kinds of the layers. Raises ValueError for a list of others."""
    count, every = config["num_hidden_layers"], config["full_attention_interval"]
    usual = [f"{'linear' if (i + 1) % every else 'full'}_attention" for i in range(count)]
    types = config["layer_types"] or usual
    if len(types) != count or set(types) - set(KINDS.values()):
        raise ValueError(f"config.json: layer_types={types}: must be {count} of {', '.join(KINDS.values())}")
    return types


def _delta(config: Config) -> Node:
    dim, heads, values = config["hidden_size"], config["linear_num_key_heads"], config["linear_num_value_heads"]
    return node(
        GatedDeltaNet,
        heads=heads,
        value_heads=values,
        expand_k=ratio(heads * config["linear_key_head_dim"], dim),
        expand_v=ratio(values * config["linear_value_head_dim"], dim),
        conv=config["linear_conv_kernel_dim"],
        norm_eps=config["rms_norm_eps"],
    )


def body(config: Config) -> Node:
    """The `model` section of a complete config.json."""
    eps = config["rms_norm_eps"]
    mixers = {
        "full_attention": ("attn", parts.attention(config, fraction=FRACTION, qk_norm=True, gate=True, norm_eps=eps)),
        "linear_attention": ("gdn", _delta(config)),
    }
    shared = config["shared_expert_intermediate_size"]
    ffns = {
        True: ("", parts.mixture(config, shared_hidden=shared, shared_gate=True)),
        False: ("_dense", node(SwiGLU, hidden=config["intermediate_size"])),
    }
    blocks, kinds = {}, []
    for kind, sparse in zip(types(config), parts.sparse(config), strict=True):
        (mixer, section), (suffix, ffn) = mixers[kind], ffns[sparse]
        blocks[mixer + suffix] = parts.block(section, ffn, eps)
        kinds.append(mixer + suffix)
    return parts.stack(config, kinds, blocks, eps)


def _delta_keys(model: Node, who: str) -> Config:
    mapping, dim = [], model["dim"]
    for name, section in layers(model):
        if section["mixer"]["_target_"] == DELTA:
            path, mixer = f"model.blocks.{name}.mixer", with_defaults(section["mixer"], GatedDeltaNet)
            must(path, mixer, {"negative_eigenvalues": False, "conv_bias": False}, who)
            if mixer["conv"] is None:
                raise ValueError(f"{path}.conv=null: must be at least 1, as in {who}")
            heads, values = mixer["heads"], mixer["value_heads"] or mixer["heads"]
            keys = {
                "linear_num_key_heads": heads,
                "linear_num_value_heads": values,
                "linear_key_head_dim": int(dim * mixer["expand_k"]) // heads,
                "linear_value_head_dim": int(dim * mixer["expand_v"]) // values,
                "linear_conv_kernel_dim": mixer["conv"],
            }
            mapping.append((path, keys))
    return one(mapping, who) or {}


def express(model: Node, who: str) -> Config:
    """The keys of a config.json of `who`. Raises ValueError."""
    attention = parts.attention_keys(model, who, partial=True, window=None, qk_norm=True, gate=True)
    if not attention:  # transformers' cache asks an attention layer for the length
        raise ValueError(f"model.pattern=[{','.join(model['pattern'])}]: must have a layer of attention for {who}")
    del attention["sliding_window"]
    experts = parts.ffn_keys(model, who, shared_gate=True)
    types = {"layer_types": [KINDS[block["mixer"]["_target_"]] for _, block in layers(model)]}
    eps = {"rms_norm_eps": parts.eps_of(model, who, {parts.ATTENTION: Attention, DELTA: GatedDeltaNet})}
    return parts.shapes(model, who) | eps | attention | _delta_keys(model, who) | experts | types


def _delta_rows(ours: str, theirs: str, config: Config) -> Entries:
    """Head of keys by head of keys, theirs has q, k, and of each of its heads of values v, z; and b, a."""
    H, N = config["linear_num_key_heads"], config["linear_num_value_heads"]
    K, V, D = config["linear_key_head_dim"], config["linear_value_head_dim"], config["hidden_size"]
    each = N // H
    wide, qkvz, ba = 2 * K + 2 * each * V, f"{theirs}.in_proj_qkvz.weight", f"{theirs}.in_proj_ba.weight"

    def rows(start: int, count: int) -> tuple[PublishedRows, ...]:
        return tuple(PublishedRows(qkvz, h * wide + start, count) for h in range(H))

    rates = [
        PublishedRows(ba, h * 2 * each + part * each + i, 1) for h in range(H) for i in range(each) for part in (1, 0)
    ]
    return {
        f"{ours}.qkv.weight": ParameterSource(rows(0, K) + rows(K, K) + rows(2 * K, each * V)),
        f"{ours}.gate.weight": ParameterSource(rows(2 * K + each * V, each * V)),
        f"{ours}.rates.weight": ParameterSource(tuple(rates)),
        f"{ours}.conv.weight": whole(f"{theirs}.conv1d.weight", 2 * H * K + N * V, TAPS),
        f"{ours}.A_log": whole(f"{theirs}.A_log", N),
        f"{ours}.dt_bias": whole(f"{theirs}.dt_bias", N),
        f"{ours}.norm.weight": whole(f"{theirs}.norm.weight", V),
        f"{ours}.out.weight": whole(f"{theirs}.out_proj.weight", D),
    }


def _entries(config: Config) -> Entries:
    rows, D = parts.ends(config, norm=ABOUT_ZERO), config["hidden_size"]
    for i, (kind, sparse) in enumerate(zip(types(config), parts.sparse(config), strict=True)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows |= parts.norms(i, D, ABOUT_ZERO)
        if kind == "full_attention":
            names = f"{ours}.mixer", f"{theirs}.self_attn"
            rows |= parts.attention_rows(*names, config, gate=True, norm=ABOUT_ZERO)
        else:
            rows |= _delta_rows(f"{ours}.mixer", f"{theirs}.linear_attn", config)
        if sparse:
            rows |= parts.mixture_rows(f"{ours}.ffn", f"{theirs}.mlp", config)
            rows |= parts.shared_rows(f"{ours}.ffn", f"{theirs}.mlp", config)
        else:
            rows |= parts.dense_rows(f"{ours}.ffn", f"{theirs}.mlp", config["intermediate_size"], D)
    return rows


def fits(config: Config) -> None:
    """Raises ValueError for values that are no model together."""
    parts.heads_fit(config)
    parts.experts_fit(config)
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if values % keys:
        raise ValueError(
            f"config.json: linear_num_value_heads={values}: must be a multiple of linear_num_key_heads={keys}"
        )


def _suits(model: Node, mixers: set[str]) -> bool:
    """Gated DeltaNet, attention, or both: what Llama and Qwen3-MoE have been asked for before."""
    return mixers <= KINDS.keys()


QWEN3_NEXT = Architecture(
    name=NAME,
    kind="qwen3_next",
    about="Gated DeltaNet and gated attention, experts beside a shared one (`model=qwen3_next_tiny`)",
    mixers=frozenset(KINDS),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "intermediate_size": 5632,
        "shared_expert_intermediate_size": 512,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "layer_types": None,
        "full_attention_interval": 4,
    },
    fixed={"hidden_act": "silu", "attention_bias": False},
    kinds={
        **parts.HEADS,
        **parts.EXPERTS,
        **dict.fromkeys(LINEAR, count()),
        "shared_expert_intermediate_size": count(),
        "layer_types": optional(WORDS),
        "full_attention_interval": count(),
    },
    fits=fits,
    unstacked=parts.unstacked,
    body=body,
    express=lambda model: express(model, NAME),
    entries=_entries,
    suits=_suits,
    mtp=beside_the_model(
        "num_nextn_predict_layers",
        {"layer_types": ["full_attention"], "mlp_only_layers": [], "decoder_sparse_step": 1},
        ABOUT_ZERO,
    ),
)
