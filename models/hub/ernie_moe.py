"""ERNIE-4.5's mixtures: attention as in the dense ones, experts by a softmax with a bias that only chooses, beside
shared ones, in the layers of a range."""

from typing import Any

from models.ffn import SwiGLU
from models.hub import decoder
from models.hub import layers as parts
from models.hub.architecture import Config, Node, layers, node, with_defaults
from models.hub.dense import ernie_rows
from models.hub.rows import Entries, PublishedTensors, whole
from models.hub.sigmoid_moe import RATE
from models.hub.tensors import StoredTensor
from models.hub.values import Kind
from models.hub.values import whole as count
from models.moe import MoE

NAME = "Ernie4_5_MoeForCausalLM"
BIAS = ".moe_statics.e_score_correction_bias"  # of one row, [1, E]
LAST = -1  # of `moe_layer_end_index`: the last layer


def _sparse(config: Config) -> list[bool]:
    """Says of each layer whether it has experts."""
    number, start, every = config["num_hidden_layers"], config["moe_layer_start_index"], config["moe_layer_interval"]
    end = number - 1 if config["moe_layer_end_index"] == LAST else config["moe_layer_end_index"]
    return [start <= i <= end and (i + 1) % every == 0 for i in range(number)]


def _experts(config: Config) -> Config:
    """The same under the names that other mixtures have."""
    names = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
    return config | {ours: config[theirs] for ours, theirs in names.items()} | {"norm_topk_prob": True}


def _fits(config: Config) -> None:
    decoder.by_row_fits(config)
    chosen, there = config["moe_k"], config["moe_num_experts"]
    if not (1 < chosen <= there or chosen == there == 1):
        raise ValueError(f"config.json: moe_k={chosen}: must be 2 to moe_num_experts={there}")
    if not any(_sparse(config)):
        raise ValueError(
            f"config.json: moe_layer_start_index={config['moe_layer_start_index']}: must leave a layer with experts"
        )


def _body(config: Config) -> Node:
    eps, mixer = config["rms_norm_eps"], parts.attention(config)
    shared = config["moe_num_shared_experts"] * config["moe_intermediate_size"]
    moe = parts.mixture(_experts(config), shared_hidden=shared, bias_rate=RATE)
    dense = node(SwiGLU, hidden=config["intermediate_size"])
    blocks = {"moe": parts.block(mixer, moe, eps), "dense": parts.block(mixer, dense, eps)}
    return parts.stack(config, ["moe" if each else "dense" for each in _sparse(config)], blocks, eps)


def _places(sparse: list[int]) -> Config:
    """The range and the interval of these layers. Raises ValueError where there are none such."""
    steps = {b - a for a, b in zip(sparse, sparse[1:], strict=False)} or {1}
    every = next(iter(steps))
    if len(steps) > 1 or every > 1 and (sparse[0] + 1) % every:
        raise ValueError(f"model.pattern: layers with experts at {sparse}: must be every so many for {NAME}")
    return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": every}


def _express(model: Node) -> Config:
    keys = parts.attention_keys(model, NAME, window=None, qk_norm=False, gate=False)
    del keys["sliding_window"]
    moes = [with_defaults(b["ffn"], MoE) for _, b in layers(model) if (b["ffn"] or {}).get("_target_") == parts.MIXTURE]
    if not moes or not moes[0]["bias_rate"]:
        raise ValueError(f"model.blocks: bias_rate of experts: must be above 0: {NAME} has a bias that chooses")
    fixed: dict[str, Any] = {"renormalise": True, "shared_gate": False, "bias_rate": moes[0]["bias_rate"]}
    ffn = parts.ffn_keys(model, NAME, **fixed)
    hidden, shared = ffn["moe_intermediate_size"], ffn["shared_expert_intermediate_size"]
    if shared % hidden:
        raise ValueError(f"model.blocks: shared_hidden={shared}: must be a multiple of {hidden} for {NAME}")
    sparse = [i for i in range(model["layers"]) if i not in ffn["mlp_only_layers"]]
    return {
        **parts.shapes(model, NAME),
        **keys,
        **{"rms_norm_eps": parts.eps_of(model, NAME), "intermediate_size": ffn["intermediate_size"]},
        **{"moe_num_experts": ffn["num_experts"], "moe_k": ffn["num_experts_per_tok"]},
        **{"moe_intermediate_size": hidden, "moe_num_shared_experts": shared // hidden},
        **_places(sparse),
    }


def _ffn_rows(ours: str, theirs: str, config: Config, layer: int) -> Entries:
    hidden, dim, full = config["moe_intermediate_size"], config["hidden_size"], _experts(config)
    if not _sparse(config)[layer]:
        return parts.dense_rows(ours, theirs, config["intermediate_size"], dim)
    rows = parts.mixture_rows(ours, theirs, full)
    rows[f"{ours}.router.selection_bias"] = whole(f"{theirs}{BIAS}", full["num_experts"])
    if shared := config["moe_num_shared_experts"] * hidden:
        rows |= parts.dense_rows(f"{ours}.shared", f"{theirs}.shared_experts", shared, dim)
    return rows


def _unstacked(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {
        name.replace(".mlp.gate.moe_statics.", ".mlp.moe_statics."): each._replace(shape=each.shape[-1:])
        if name.endswith(BIAS)
        else each
        for name, each in parts.unstacked(stored).items()
    }


def _stacked(tensors: PublishedTensors) -> PublishedTensors:
    return {
        name: ((1, *shape), places) if name.endswith(BIAS) else (shape, places)
        for name, (shape, places) in tensors.items()
    }


PLACES: dict[str, Kind] = {
    "moe_layer_end_index": Kind("a whole number of at least -1", lambda v: type(v) is int and v >= LAST),
    "moe_layer_start_index": count(0),
    "moe_layer_interval": count(),
}
ERNIE_MOE = decoder.architecture(
    NAME,
    "ernie4_5_moe",
    about="the mixtures: as the dense ones, experts with a bias that chooses, beside shared ones",
    defaults={
        **decoder.USUAL,
        **{"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072},
        **{"tie_word_embeddings": True, "rope_theta": 500_000.0, "moe_intermediate_size": 1536, "moe_k": 6},
        **{"moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_layer_start_index": 1},
        **{"moe_layer_end_index": LAST, "moe_layer_interval": 1},
    },
    fixed={"hidden_act": "silu", "use_bias": False, "moe_norm_min": 1e-12},
    kinds={
        **parts.HEADS,
        **dict.fromkeys(("moe_intermediate_size", "moe_k", "moe_num_experts"), count()),
        **{"moe_num_shared_experts": count(0), **PLACES},
    },
    fits=_fits,
    unstacked=_unstacked,
    stacked=_stacked,
    body=_body,
    express=_express,
    entries=decoder.entries(ernie_rows, _ffn_rows),
    aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    left_out=("model.mtp_",),  # of multi-token prediction, which transformers leaves out as well
)
