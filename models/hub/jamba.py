"""Jamba (2403.19887): Mamba with norms of what the step sizes are made of, B and C, attention without positions in some
layers, SwiGLU, or experts of its width in every so many layers.
"""

import math
from typing import Any

from models.ffn import SwiGLU
from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, must, node, one, with_defaults
from models.hub.bamba import attention_keys
from models.hub.decoder import attentions, changed, rotates
from models.hub.mamba import AUTO, MIXER, RANK, mixer_rows
from models.hub.rows import Entries, ParameterSource, PublishedRows, whole
from models.hub.values import FLAG
from models.hub.values import whole as count
from models.mixers.mamba import Mamba
from models.positions import NoPE

NAME = "JambaForCausalLM"


def _attends(config: Config) -> list[bool]:
    period, offset = config["attn_layer_period"], config["attn_layer_offset"]
    return [i % period == offset for i in range(config["num_hidden_layers"])]


def _sparse(config: Config) -> list[bool]:
    period, offset = config["expert_layer_period"], config["expert_layer_offset"]
    return [config["num_experts"] > 1 and i % period == offset for i in range(config["num_hidden_layers"])]


def _rank(config: Config) -> int:
    rank: int | str = config["mamba_dt_rank"]
    return math.ceil(config["hidden_size"] / 16) if isinstance(rank, str) else rank


def _experts(config: Config) -> Config:
    """The same under the names that other mixtures have."""
    return config | {"moe_intermediate_size": config["intermediate_size"], "norm_topk_prob": False}


def _body(config: Config) -> Node:
    eps = config["rms_norm_eps"]
    attention = parts.attention(config)
    attention["positions"] = node(NoPE, partial=False)
    mamba = node(
        Mamba,
        expand=float(config["mamba_expand"]),
        state=config["mamba_d_state"],
        rank=_rank(config),
        conv=config["mamba_d_conv"],
        conv_bias=config["mamba_conv_bias"],
        inner_norm="weighted",
        norm_eps=eps,
    )
    mixers = {True: ("attn", attention), False: ("mamba", mamba)}
    blocks, kinds = {}, []
    for attends, sparse in zip(_attends(config), _sparse(config), strict=True):
        name, mixer = mixers[attends]
        kinds.append(name + ("_moe" if sparse else ""))
        ffn = parts.mixture(_experts(config)) if sparse else node(SwiGLU, hidden=config["intermediate_size"])
        blocks[kinds[-1]] = parts.block(mixer, ffn, eps)
    return parts.stack(config, kinds, blocks, eps)


def _every(flags: list[bool], what: str) -> tuple[int, int]:
    """The period and the offset of the layers that have the flag. Raises ValueError where there are none such."""
    places = [i for i, flag in enumerate(flags) if flag]
    period = places[1] - places[0] if len(places) > 1 else max(len(flags), places[0] + 1)
    if places != [i for i in range(len(flags)) if i % period == places[0]]:
        raise ValueError(f"model.pattern: layers with {what} at {places}: must be every so many, for {NAME}")
    return period, places[0]


def _express(model: Node) -> Config:
    for path, mixer in attentions(model):
        if rotates(mixer):
            raise ValueError(f"{path}.positions: must be NoPE, as in {NAME}")
    keys = attention_keys(changed(model, lambda mixer: {"positions": None}), NAME, partial=False)
    del keys["rope_parameters"]
    if keys["head_dim"] * keys["num_attention_heads"] != model["dim"]:
        raise ValueError(f"model.blocks: head_dim={keys['head_dim']}: must share out dim={model['dim']} for {NAME}")
    del keys["head_dim"]
    mapping = []
    for name, section in layers(model):
        if section["mixer"]["_target_"] == MIXER:
            path, mixer = f"model.blocks.{name}.mixer", with_defaults(section["mixer"], Mamba)
            must(path, mixer, {"inner_norm": "weighted"}, NAME)
            if not float(mixer["expand"]).is_integer():
                raise ValueError(f"{path}.expand={mixer['expand']}: must be a whole number, as in {NAME}")
            rank = math.ceil(model["dim"] / 16) if mixer["rank"] is None else mixer["rank"]
            own = {"mamba_expand": int(mixer["expand"]), "mamba_d_state": mixer["state"], "mamba_dt_rank": rank}
            mapping.append((path, own | {"mamba_d_conv": mixer["conv"], "mamba_conv_bias": mixer["conv_bias"]}))
    attends = [section["mixer"]["_target_"] == parts.ATTENTION for _, section in layers(model)]
    period, offset = _every(attends, "attention")
    eps = parts.eps_of(model, NAME, {MIXER: Mamba})
    more: Config = {"attn_layer_period": period, "attn_layer_offset": offset, "rms_norm_eps": eps}
    return parts.shapes(model, NAME) | keys | one(mapping, NAME) | _expert_keys(model) | more | {"pad_token_id": None}


def _expert_keys(model: Node) -> Config:
    keys = parts.ffn_keys(model, NAME, shared_hidden=0)
    dense, hidden = keys["mlp_only_layers"], keys["intermediate_size"]
    if not keys["num_experts"]:
        return {"num_experts": 1, "num_experts_per_tok": 1, "intermediate_size": hidden}
    if dense and hidden != keys["moe_intermediate_size"] or keys["norm_topk_prob"]:
        kind = "norm_topk_prob" if keys["norm_topk_prob"] else "hidden"
        raise ValueError(f"model.blocks: {kind} of experts: must be as wide as SwiGLU, and not renormalised, in {NAME}")
    period, offset = _every([i not in dense for i in range(model["layers"])], "experts")
    own = {key: keys[key] for key in ("num_experts", "num_experts_per_tok")}
    return own | {"intermediate_size": hidden, "expert_layer_period": period, "expert_layer_offset": offset}


def _expert_rows(ours: str, theirs: str, config: Config) -> Entries:
    rows = parts.mixture_rows(ours, theirs, _experts(config))
    rows[f"{ours}.router.weight"] = whole(f"{theirs}.router.weight", config["num_experts"])
    return rows


def _entries(config: Config) -> Entries:
    D, hidden = config["hidden_size"], config["intermediate_size"]
    sizes: dict[str, Any] = {"dim": D, "inner": config["mamba_expand"] * D, "state": config["mamba_d_state"]}
    sizes |= {"rank": _rank(config), "conv_bias": config["mamba_conv_bias"]}
    rows = parts.ends(config, last="final_layernorm")
    for i, (attends, sparse) in enumerate(zip(_attends(config), _sparse(config), strict=True)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows[f"{ours}.mixer_norm.weight"] = whole(f"{theirs}.input_layernorm.weight", D)
        rows[f"{ours}.ffn_norm.weight"] = whole(f"{theirs}.pre_ff_layernorm.weight", D)
        if attends:
            rows |= parts.attention_rows(f"{ours}.mixer", f"{theirs}.self_attn", config)
        else:
            rows |= mixer_rows(f"{ours}.mixer", f"{theirs}.mamba", **sizes)
            for place, (name, width) in enumerate(zip(("dt", "b", "c"), _widths(config), strict=True)):
                own = (PublishedRows(f"{theirs}.mamba.{name}_layernorm.weight", 0, width),)
                rows[f"{ours}.mixer.norms.{place}.weight"] = ParameterSource(own)
        names = f"{ours}.ffn", f"{theirs}.feed_forward"
        rows |= _expert_rows(*names, config) if sparse else parts.dense_rows(*names, hidden, D)
    return rows


def _widths(config: Config) -> tuple[int, int, int]:
    return _rank(config), config["mamba_d_state"], config["mamba_d_state"]


def _fits(config: Config) -> None:
    parts.heads_fit(config)
    for kind in ("attn", "expert"):
        offset, period = config[f"{kind}_layer_offset"], config[f"{kind}_layer_period"]
        if offset >= period:
            raise ValueError(f"config.json: {kind}_layer_offset={offset}: must be below {kind}_layer_period={period}")
    if config["num_experts"] > 1:
        parts.experts_fit(_experts(config))


JAMBA = Architecture(
    name=NAME,
    kind="jamba",
    about="Mamba with norms inside, attention without positions in some layers, experts or SwiGLU",
    mixers=frozenset({parts.ATTENTION, MIXER}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
        **{"intermediate_size": 14_336, "num_key_value_heads": 8, "head_dim": None, "rms_norm_eps": 1e-6},
        **{"max_position_embeddings": 262_144, "tie_word_embeddings": False},
        **{"num_experts": 16, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2},
        **{"mamba_dt_rank": AUTO, "mamba_conv_bias": True},
    },
    fixed={"hidden_act": "silu", "mamba_proj_bias": False},
    kinds={
        **parts.HEADS,
        **dict.fromkeys(("num_experts", "num_experts_per_tok", "expert_layer_period", "attn_layer_period"), count()),
        **dict.fromkeys(("expert_layer_offset", "attn_layer_offset"), count(0)),
        **dict.fromkeys(("mamba_d_state", "mamba_d_conv", "mamba_expand"), count()),
        **{"mamba_dt_rank": RANK, "mamba_conv_bias": FLAG},
    },
    fits=_fits,
    unstacked=parts.unstacked,
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: mixers == {parts.ATTENTION, MIXER},
)
