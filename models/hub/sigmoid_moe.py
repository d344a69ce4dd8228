"""Mixtures as DeepSeek-V3 has them (2412.19437): sigmoid scores, a bias that only chooses, groups of experts, shared
experts without a gate, and dense layers in front. The families with them share these tables.

The bias is a buffer here (`models.router`), and moves by `RATE` once such a model is trained further.
"""

from typing import Any

from models.ffn import SwiGLU
from models.hub import layers as parts
from models.hub.architecture import Config, Node, layers, must, node, one, with_defaults
from models.hub.rows import Entries, whole
from models.hub.values import ABOVE_ZERO, FLAG, Kind, optional
from models.hub.values import whole as count
from models.moe import MoE

RATE = 0.001
SWIGLU_EXPERTS: Config = {"expert": "swiglu", "bias": False, "latent": None, "capacity_factor": None}
DEFAULTS: Config = {
    **{"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1},
}
RULES: dict[str, Kind] = {  # of a choice
    **dict.fromkeys(("n_group", "topk_group"), optional(count())),
    "norm_topk_prob": FLAG,
    "routed_scaling_factor": ABOVE_ZERO,
}
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"), count()),
    **RULES,
    "n_shared_experts": optional(count(0)),
    "first_k_dense_replace": optional(count(0)),
}


def fits(config: Config, key: str = "n_routed_experts") -> None:
    """Raises ValueError for a choice of experts that is none. key: that says how many there are."""
    chosen, there = config["num_experts_per_tok"], config["n_routed_experts"]
    groups, top = config["n_group"] or 1, config["topk_group"] or 1
    if there % groups or there // groups < 2 and groups > 1:
        raise ValueError(f"config.json: n_group={groups}: must divide {key}={there} into groups of 2 or more")
    if top > groups:
        raise ValueError(f"config.json: topk_group={top}: must be at most n_group={groups}")
    most = there // groups * top
    if chosen > most:
        raise ValueError(
            f"config.json: num_experts_per_tok={chosen}: must be at most {most}, the experts to choose from"
        )
    if config["norm_topk_prob"] and chosen == 1 < there:
        raise ValueError("config.json: norm_topk_prob=true: must be false with num_experts_per_tok=1")


def sparse(config: Config) -> list[bool]:
    """Says of each layer whether it has experts."""
    return [i >= (config["first_k_dense_replace"] or 0) for i in range(config["num_hidden_layers"])]


def mixture(config: Config, **values: Any) -> Node:
    """A section of experts."""
    groups = config["n_group"] or 1
    return node(
        MoE,
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        hidden=config["moe_intermediate_size"],
        shared_hidden=(config["n_shared_experts"] or 0) * config["moe_intermediate_size"],
        router="sigmoid",
        renormalise=config["norm_topk_prob"],
        scale=float(config["routed_scaling_factor"]),
        bias_rate=RATE,
        expert_groups=groups,
        top_groups=config["topk_group"] if groups > 1 else 1,
        **values,
    )


def body(config: Config, mixers: list[tuple[str, Node]]) -> Node:
    """The `model` section of layers with these mixers, dense ones in front."""
    eps, dense, moe = config["rms_norm_eps"], node(SwiGLU, hidden=config["intermediate_size"]), mixture(config)
    blocks, kinds = {}, []
    for (name, mixer), sparse_one in zip(mixers, sparse(config), strict=True):
        kinds.append(name + ("" if sparse_one else "_dense"))
        blocks[kinds[-1]] = parts.block(mixer, moe if sparse_one else dense, eps)
    return parts.stack(config, kinds, blocks, eps)


def keys(model: Node, who: str, **fixed: Any) -> Config:
    """The keys of a config.json for all feed-forwards. Raises ValueError. fixed: further keys of the experts."""
    wide, mapping, front = [], [], 0
    for i, (name, section) in enumerate(layers(model)):
        path, ffn = f"model.blocks.{name}.ffn", section["ffn"] or {"_target_": "null"}
        if ffn["_target_"] == parts.DENSE and front == i:
            front = i + 1
            wide.append((f"{path}.hidden", parts.hidden(path, ffn, who)))
            continue
        if ffn["_target_"] != parts.MIXTURE:
            kind = ffn["_target_"].rpartition(".")[2]
            raise ValueError(f"{path}={kind}: must be MoE behind the first dense layers for {who}")
        moe = with_defaults(ffn, MoE)
        must(path, moe, {**SWIGLU_EXPERTS, "router": "sigmoid", "shared_gate": False, **fixed}, who)
        if not moe["bias_rate"]:
            raise ValueError(f"{path}.bias_rate={moe['bias_rate']:g}: must be above 0: {who} has a bias that chooses")
        if moe["shared_hidden"] % moe["hidden"]:
            raise ValueError(f"{path}.shared_hidden={moe['shared_hidden']}: must be a multiple of {moe['hidden']}")
        named = {
            **{"n_routed_experts": moe["num_experts"], "num_experts_per_tok": moe["top_k"]},
            **{"moe_intermediate_size": moe["hidden"], "n_shared_experts": moe["shared_hidden"] // moe["hidden"]},
            **{"norm_topk_prob": moe["renormalise"], "routed_scaling_factor": moe["scale"]},
            **{"n_group": moe["expert_groups"], "topk_group": moe["top_groups"]},
        }
        mapping.append((path, named))
    sizes = one(mapping, who)
    if sizes is None:
        raise ValueError(f"model.pattern=[{','.join(model['pattern'])}]: must have a layer of experts for {who}")
    return sizes | {
        "first_k_dense_replace": front,
        "intermediate_size": one(wide, who) or sizes["moe_intermediate_size"],
    }


def rows(ours: str, theirs: str, config: Config, layer: int) -> Entries:
    """The rows of a layer's feed-forward."""
    hidden, dim, E = config["moe_intermediate_size"], config["hidden_size"], config["n_routed_experts"]
    if not sparse(config)[layer]:
        return parts.dense_rows(ours, theirs, config["intermediate_size"], dim)
    rows = parts.mixture_rows(ours, theirs, config | {"num_experts": E})
    rows[f"{ours}.router.selection_bias"] = whole(f"{theirs}.gate.e_score_correction_bias", E)
    if config["n_shared_experts"]:
        rows |= parts.dense_rows(f"{ours}.shared", f"{theirs}.shared_experts", hidden * config["n_shared_experts"], dim)
    return rows
