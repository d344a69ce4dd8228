"""MiniMax-01 (2501.08313): Lightning attention in most layers, softmax attention in the others, experts in all; the
residual stream goes on from what a part has read, normed, times a factor.

The factor of a part's output is taken into its weights, and comes out at 1.
"""

from typing import Any

from models.hub import decoder
from models.hub import layers as parts
from models.hub.architecture import Architecture, Config, Node, layers, must, node, one, target, with_defaults
from models.hub.bamba import times
from models.hub.mixtral import renamed, unstacked
from models.hub.rows import Entries, ParameterSource, whole
from models.hub.values import ABOVE_ZERO, WORDS, Kind, optional, shown
from models.hub.values import whole as count
from models.mixers.lightning import Lightning

NAME = "MiniMaxForCausalLM"
LINEAR = target(Lightning)
OUTPUT_EPS = 1e-6  # of the norm of a linear layer's output, whatever the configuration says of the others
KINDS = {"full_attention": "attn", "linear_attention": "lightning"}
PARTS = {"full_attention": "full_attn", "linear_attention": "linear_attn"}
ALPHAS = tuple(f"{part}_alpha_factor" for part in (*PARTS.values(), "mlp"))
BETAS = tuple(f"{part}_beta_factor" for part in (*PARTS.values(), "mlp"))
FACTORS: dict[str, Kind] = dict.fromkeys((*ALPHAS, *BETAS), ABOVE_ZERO)


def _types(config: Config) -> list[str]:
    """The type of each layer. Raises ValueError for types that are none."""
    number, types = config["num_hidden_layers"], config["layer_types"]
    if types is None:
        return [tuple(KINDS)[i % 2] for i in range(number)]
    if len(types) != number or set(types) - KINDS.keys():
        raise ValueError(f"config.json: layer_types={shown(types)}: must be {number} of {', '.join(KINDS)}")
    return list(types)


def _experts(config: Config) -> Config:
    """The same under the names that other mixtures have."""
    names = {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}
    return config | {ours: config[theirs] for ours, theirs in names.items()} | {"norm_topk_prob": True}


def _fits(config: Config) -> None:
    parts.heads_fit(config)
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    width = config["head_dim"] or dim // heads
    if "linear_attention" in _types(config) and heads * width != dim:
        raise ValueError(f"config.json: head_dim={width}: must be hidden_size={dim} / num_attention_heads={heads}")
    chosen, there = config["num_experts_per_tok"], config["num_local_experts"]
    if not (1 < chosen <= there or chosen == there == 1):
        raise ValueError(f"config.json: num_experts_per_tok={chosen}: must be 2 to num_local_experts={there}")


def _body(config: Config) -> Node:
    eps, moe = config["rms_norm_eps"], parts.mixture(_experts(config))
    attention = parts.attention(config, window=config["sliding_window"])
    linear = node(Lightning, heads=config["num_attention_heads"], norm_eps=OUTPUT_EPS)
    blocks = {}
    for kind, mixer in (("full_attention", attention), ("linear_attention", linear)):
        scales = {"mixer_residual_scale": float(config[f"{PARTS[kind]}_alpha_factor"])}
        scales["ffn_residual_scale"] = float(config["mlp_alpha_factor"])
        blocks[KINDS[kind]] = parts.block(mixer, moe, eps) | {"residual": "normed"} | scales
    return parts.stack(config, [KINDS[each] for each in _types(config)], blocks, eps)


def _express(model: Node) -> Config:
    types, linear, eps = [], [], [("model.norm_eps", model.get("norm_eps", 1e-5))]
    alphas: dict[str, list[tuple[str, float]]] = {key: [] for key in ALPHAS}
    usual: Node = {"norms": "pre", "residual": "input", "mixer_residual_scale": 1.0, "ffn_residual_scale": 1.0}
    for name, section in layers(model):
        path, block = f"model.blocks.{name}", usual | section
        must(path, block, {"norms": "pre", "residual": "normed"}, NAME)
        is_linear = section["mixer"]["_target_"] == LINEAR
        types.append("linear_attention" if is_linear else "full_attention")
        eps.append((f"{path}.norm_eps", section.get("norm_eps", 1e-5)))
        alphas[f"{PARTS[types[-1]]}_alpha_factor"].append(
            (f"{path}.mixer_residual_scale", block["mixer_residual_scale"])
        )
        alphas["mlp_alpha_factor"].append((f"{path}.ffn_residual_scale", block["ffn_residual_scale"]))
        if is_linear:
            mixer = with_defaults(section["mixer"], Lightning)
            must(f"{path}.mixer", mixer, {"rates": "minimax", "norm_eps": OUTPUT_EPS}, NAME)
            linear.append((f"{path}.mixer.heads", mixer["heads"]))
    keys = parts.attention_keys(model, NAME, qk_norm=False, gate=False)
    if not keys:  # the cache of `transformers` asks one for the length
        raise ValueError(f"model.pattern=[{','.join(model['pattern'])}]: must have a layer of attention for {NAME}")
    width = model["dim"] // keys["num_attention_heads"]
    if linear and (one(linear, NAME), width) != (keys["num_attention_heads"], keys["head_dim"]):
        raise ValueError(f"{linear[0][0]}={linear[0][1]}: must be the heads of attention, as wide, for {NAME}")
    experts = parts.only_experts(model, NAME, shared_hidden=0, renormalise=True)
    sizes = {"num_local_experts": experts["num_experts"], "intermediate_size": experts["moe_intermediate_size"]}
    sizes["num_experts_per_tok"] = experts["num_experts_per_tok"]
    factors: dict[str, Any] = {key: one(values, NAME) or 1.0 for key, values in alphas.items()}
    factors |= dict.fromkeys(BETAS, 1.0)
    more = {"rms_norm_eps": one(eps, NAME), "layer_types": types}
    return parts.shapes(model, NAME) | keys | sizes | factors | more


def _linear_rows(ours: str, theirs: str, config: Config) -> Entries:
    D = config["hidden_size"]
    return {
        f"{ours}.qkv.weight": whole(f"{theirs}.qkv_proj.weight", 3 * D),
        f"{ours}.gate.weight": whole(f"{theirs}.output_gate.weight", D),
        f"{ours}.norm.weight": whole(f"{theirs}.norm.weight", D),
        f"{ours}.out.weight": whole(f"{theirs}.out_proj.weight", D),
    }


def _entries(config: Config) -> Entries:
    rows, full = parts.ends(config), _experts(config)
    for i, kind in enumerate(_types(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        make = _linear_rows if kind == "linear_attention" else parts.attention_rows
        own = make(f"{ours}.mixer", f"{theirs}.self_attn", config)
        rows |= parts.norms(i, config["hidden_size"])
        rows |= times(own, f"{ours}.mixer.out.weight", config[f"{PARTS[kind]}_beta_factor"])
        experts: Entries = {}
        for name, entry in parts.mixture_rows(f"{ours}.ffn", f"{theirs}.block_sparse_moe", full).items():
            pieces = (piece._replace(source=renamed(piece.source)) for piece in entry.pieces)
            experts[name] = ParameterSource(tuple(pieces), entry.form)
        rows |= times(experts, f"{ours}.ffn.experts.down", config["mlp_beta_factor"])
    return rows


MINIMAX = Architecture(
    name=NAME,
    kind="minimax",
    about="Lightning attention and softmax attention, experts in every layer, a residual stream of what was normed",
    mixers=frozenset({parts.ATTENTION, LINEAR}),
    defaults={
        **decoder.USUAL,
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072},
        **{"rope_theta": 1_000_000.0, "sliding_window": None, "layer_types": None},
        **{"num_local_experts": 8, "num_experts_per_tok": 2},
        **dict.fromkeys(FACTORS, 1.0),
    },
    fixed={"hidden_act": "silu"},
    kinds={
        **parts.HEADS,
        **FACTORS,
        **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), count()),
        **{"sliding_window": optional(count()), "layer_types": optional(WORDS)},
    },
    fits=_fits,
    unstacked=unstacked,
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: parts.ATTENTION in mixers and mixers <= {parts.ATTENTION, LINEAR},
    aliases={"num_experts": "num_local_experts"},
    beyond=frozenset({"residual", "mixer_residual_scale", "ffn_residual_scale"}),
    left_out=(".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay"),  # which follow from the configuration
)
