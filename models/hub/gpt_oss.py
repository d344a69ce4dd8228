"""gpt-oss (2508.10925): attention with biases and learnt sinks, windows in every other layer, experts of a clamped
SwiGLU with biases in every layer. Released weights are quantised (MXFP4): they come in once `transformers` has written
them at bf16.

Legend: E experts, D model width, I inner width of an expert.
"""

from typing import Any

import torch
from torch import Tensor

from models.hub import decoder
from models.hub import layers as parts
from models.hub.architecture import Config, Node, layers, must, node, one, with_defaults
from models.hub.rows import Entries, Form, PublishedTensors, whole
from models.hub.tensors import StoredTensor
from models.hub.values import FLAG, WORDS, optional
from models.hub.values import whole as count
from models.moe import MoE

NAME = "GptOssForCausalLM"
STACKED = ("experts.gate_up_proj", "experts.down_proj")  # of three dimensions, whose first two are one in the tables
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN |= {"original_max_position_embeddings": 4096, "rope_theta": 150_000.0}


def _apart(x: Tensor) -> Tensor:
    """Gates, then values, of columns in which they take turns."""
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)


def _in_turn(x: Tensor) -> Tensor:
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def _of_matrices(here: Any, there: Any) -> Form:
    """Ours [E, D, K]; published rows [K], D for each expert."""
    return Form(
        lambda shape: shape[1],
        lambda shape: shape[2:],
        lambda x: here(x),
        lambda x: there(x).flatten(0, 1),
    )


def _matrices(rows: int, *, turned: bool) -> Form:
    """The form of experts' matrices with so many rows each. turned: whether columns take turns there."""
    ours = _apart if turned else (lambda x: x)
    theirs = _in_turn if turned else (lambda x: x)
    return _of_matrices(lambda x: ours(x.unflatten(0, (-1, rows))), theirs)


IN_TURN = Form(lambda shape: 1, lambda shape: shape[1:], _apart, _in_turn)


def _settled(config: Config) -> Config:
    """The configuration with the rule of positions that its reader takes for none."""
    named = config.get("rope_scaling") or config.get("rope_parameters")
    return config if named else config | {"rope_parameters": YARN}


def _body(config: Config) -> Node:
    bias = config["attention_bias"]
    plain = parts.attention(config, qkv_bias=bias, out_bias=bias, sink_logits=True)
    mixers = {False: ("attn", plain), True: ("window", {**plain, "window": config["sliding_window"]})}
    moe = node(
        MoE,
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        hidden=config["intermediate_size"],
        expert="clamped",
        bias=True,
    )
    flags = decoder.windows(config, lambda i: i % 2 == 0)
    return decoder.body(config, [mixers[each] for each in flags], moe)


def _express(model: Node) -> Config:
    bias = decoder.first(model, "qkv_bias")
    flags = {"qk_norm": False, "gate": False, "qkv_bias": bias, "out_bias": bias, "sink_logits": True}
    keys = parts.attention_keys(decoder.changed(model, lambda mixer: {"window": None}), NAME, **flags)
    keys |= decoder.window_keys(model, NAME)
    del keys["use_sliding_window"]
    mapping = []
    fixed = parts.PLAIN_MIXTURE | {"expert": "clamped", "bias": True, "shared_hidden": 0, "renormalise": True}
    for name, section in layers(model):
        path, ffn = f"model.blocks.{name}.ffn", section["ffn"] or {"_target_": "null"}
        if ffn["_target_"] != parts.MIXTURE:
            raise ValueError(f"{path}={ffn['_target_'].rpartition('.')[2]}: must be MoE for {NAME}")
        moe = with_defaults(ffn, MoE)
        must(path, moe, fixed, NAME)
        names = {"num_local_experts": "num_experts", "num_experts_per_tok": "top_k", "intermediate_size": "hidden"}
        mapping.append((path, {theirs: moe[ours] for theirs, ours in names.items()}))
    more = {"attention_bias": bias, "rms_norm_eps": parts.eps_of(model, NAME)}
    return parts.shapes(model, NAME) | decoder.with_window(keys) | one(mapping, NAME) | more


def _attention_rows(ours: str, theirs: str, config: Config) -> Entries:
    bias = config["attention_bias"]
    rows = parts.attention_rows(ours, theirs, config, bias=bias, out_bias=bias)
    return rows | {f"{ours}.sink_logits": whole(f"{theirs}.sinks", config["num_attention_heads"])}


def _ffn_rows(ours: str, theirs: str, config: Config, layer: int) -> Entries:
    E, hidden, D = config["num_local_experts"], config["intermediate_size"], config["hidden_size"]
    source = f"{theirs}.experts"
    return {
        f"{ours}.router.weight": whole(f"{theirs}.router.weight", E),
        f"{ours}.router.bias": whole(f"{theirs}.router.bias", E),
        f"{ours}.experts.gate_up": whole(f"{source}.gate_up_proj", E * D, _matrices(D, turned=True)),
        f"{ours}.experts.gate_up_bias": whole(f"{source}.gate_up_proj_bias", E, IN_TURN),
        f"{ours}.experts.down": whole(f"{source}.down_proj", E * hidden, _matrices(hidden, turned=False)),
        f"{ours}.experts.down_bias": whole(f"{source}.down_proj_bias", E),
    }


def _unstacked(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {
        name: each._replace(shape=(each.shape[0] * each.shape[1], *each.shape[2:]))
        if name.endswith(STACKED) and len(each.shape) == 3
        else each
        for name, each in stored.items()
    }


def _stacked(tensors: PublishedTensors) -> PublishedTensors:
    experts = {name.rpartition(".")[0]: shape[0] for name, (shape, _) in tensors.items() if name.endswith("proj_bias")}
    written = {}
    for name, (shape, places) in tensors.items():
        if name.endswith(STACKED):
            number = experts[name.rpartition(".")[0]]
            shape = (number, shape[0] // number, *shape[1:])
        written[name] = (shape, places)
    return written


def _fits(config: Config) -> None:
    parts.heads_fit(config)
    chosen, there = config["num_experts_per_tok"], config["num_local_experts"]
    if not (1 < chosen <= there or chosen == there == 1):
        raise ValueError(f"config.json: num_experts_per_tok={chosen}: must be 2 to num_local_experts={there}")


GPT_OSS = decoder.architecture(
    NAME,
    "gpt_oss",
    about="attention with biases and learnt sinks, a window in every other layer, experts of a clamped SwiGLU",
    defaults={
        **decoder.USUAL,
        **{"intermediate_size": 2880, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 131_072, "attention_bias": True, "rope_theta": 150_000.0},
        **{"sliding_window": 128, "layer_types": None, "num_local_experts": 128, "num_experts_per_tok": 4},
    },
    fixed={"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    kinds={
        **parts.HEADS,
        **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), count()),
        **{"attention_bias": FLAG, "sliding_window": optional(count()), "layer_types": optional(WORDS)},
    },
    fits=_fits,
    settled=_settled,
    unstacked=_unstacked,
    stacked=_stacked,
    body=_body,
    express=_express,
    entries=decoder.entries(_attention_rows, _ffn_rows),
    aliases={"num_experts": "num_local_experts"},
)
