"""Falcon-H1 (2507.22448): attention beside Mamba-2 in every layer, SwiGLU, and eleven multipliers, which an import
takes into the weights and an export leaves at 1.

Legend: D model width, H heads, G groups, N state.
"""

from typing import Any

from models.ffn import SwiGLU
from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, must, node, one, ratio, with_defaults
from models.hub.bamba import AUTO, SSM_FIXED, SSM_KINDS
from models.hub.decoder import only_dense
from models.hub.mamba2 import MIXER, UNLIMITED, mixer_rows
from models.hub.rows import Entries, times_rows, whole
from models.hub.values import ABOVE_ZERO, FLAG, NUMBER, Kind, listed, optional, shown
from models.hub.values import whole as count
from models.mixers.mamba2 import Mamba2

NAME = "FalconH1ForCausalLM"
FACTORS = ("embedding", "lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
MULTIPLIERS = tuple(f"{name}_multiplier" for name in FACTORS)
LISTS = {"mlp_multipliers": 2, "ssm_multipliers": 5}  # of gate and down; of z, x, B, C, dt
ONES: Config = dict.fromkeys(MULTIPLIERS, 1.0) | {key: [1.0] * length for key, length in LISTS.items()}


def _settled(config: Config) -> Config:
    """The configuration with lists of ones for null."""
    return config | {key: ONES[key] for key in LISTS if config.get(key) is None}


def _inner(config: Config) -> int:
    inner: int = config["mamba_d_ssm"] or config["mamba_expand"] * config["hidden_size"]
    return inner


def _fits(config: Config) -> None:
    parts.heads_fit(config)
    heads, inner, width = config["mamba_n_heads"], _inner(config), config["mamba_d_head"]
    if inner % heads or width not in (AUTO, inner // heads):
        raise ValueError(f"config.json: mamba_n_heads={heads}: must be mamba_d_ssm={inner} / mamba_d_head={width}")
    if heads % config["mamba_n_groups"]:
        raise ValueError(f"config.json: mamba_n_groups={config['mamba_n_groups']}: must divide mamba_n_heads={heads}")
    if config["time_step_limit"] not in UNLIMITED:
        raise ValueError(f"config.json: time_step_limit={shown(config['time_step_limit'])}: must be [0, Infinity]")
    for key, length in LISTS.items():
        if len(config[key]) != length:
            raise ValueError(f"config.json: {key}={shown(config[key])}: must be {length} numbers")


def _out_norm(config: Config) -> str:
    if not config["mamba_rms_norm"]:
        return "none"
    return "before_gate" if config["mamba_norm_before_gate"] else "gated"


def _body(config: Config) -> Node:
    eps, dim = config["rms_norm_eps"], config["hidden_size"]
    mamba = node(
        Mamba2,
        heads=config["mamba_n_heads"],
        expand=ratio(_inner(config), dim),
        state=config["mamba_d_state"],
        groups=config["mamba_n_groups"],
        conv=config["mamba_d_conv"],
        conv_bias=config["mamba_conv_bias"],
        out_norm=_out_norm(config),
        norm_eps=eps,
    )
    block = parts.block(mamba, node(SwiGLU, hidden=config["intermediate_size"]), eps)
    block["beside"] = parts.attention(config)
    model = parts.stack(config, ["hybrid"] * config["num_hidden_layers"], {"hybrid": block}, eps)
    if not model["tied"]:
        return model
    return model | {"tied_scale": config["lm_head_multiplier"] / config["embedding_multiplier"]}


def _express(model: Node) -> Config:
    mapping, blocks = [], dict(model["blocks"])
    for name, block in layers(model):
        path, beside = f"model.blocks.{name}", block.get("beside") or {"_target_": "null"}
        for part, section, kind in (("mixer", block["mixer"], MIXER), ("beside", beside, parts.ATTENTION)):
            if section["_target_"] != kind:
                found, wanted = (each.rpartition(".")[2] for each in (section["_target_"], kind))
                raise ValueError(f"{path}.{part}={found}: must be {wanted} for {NAME}")
        blocks[name] = {**blocks[name], "mixer": beside}
        mixer = with_defaults(block["mixer"], Mamba2)
        must(f"{path}.mixer", mixer, {"dt_min": 0.0}, NAME)
        inner, heads, norm = int(model["dim"] * mixer["expand"]), mixer["heads"], mixer["out_norm"]
        keys = {"mamba_d_ssm": inner, "mamba_n_heads": heads, "mamba_d_head": inner // heads}
        keys |= {"mamba_n_groups": mixer["groups"], "mamba_d_state": mixer["state"], "mamba_d_conv": mixer["conv"]}
        keys |= {"mamba_rms_norm": norm != "none", "mamba_norm_before_gate": norm != "gated"}
        mapping.append((f"{path}.mixer", keys | {"mamba_conv_bias": mixer["conv_bias"]}))
    attention = parts.attention_keys({**model, "blocks": blocks}, NAME, window=None, qk_norm=False, gate=False)
    del attention["sliding_window"]
    eps = {"rms_norm_eps": parts.eps_of(model, NAME, {MIXER: Mamba2})}
    sizes = parts.shapes(model, NAME) | only_dense(model, NAME)
    return sizes | eps | attention | one(mapping, NAME) | ONES | {"pad_token_id": None}


def _layer_rows(ours: str, theirs: str, config: Config) -> Entries:
    D, hidden = config["hidden_size"], config["intermediate_size"]
    rows = mixer_rows(
        f"{ours}.mixer",
        f"{theirs}.mamba",
        dim=D,
        heads=config["mamba_n_heads"],
        inner=_inner(config),
        groups=config["mamba_n_groups"],
        state=config["mamba_d_state"],
        conv_bias=config["mamba_conv_bias"],
        normed=config["mamba_rms_norm"],
    )
    rows |= parts.attention_rows(f"{ours}.beside", f"{theirs}.self_attn", config)
    rows |= parts.dense_rows(f"{ours}.ffn", f"{theirs}.feed_forward", hidden, D)
    gate, down = config["mlp_multipliers"]
    z, x, b, c, dt = (config["ssm_in_multiplier"] * each for each in config["ssm_multipliers"])
    into, key = config["attention_in_multiplier"], config["key_multiplier"]
    pairs = {  # of pieces in turn: B and C, keys and values, gates and values
        **{"mixer.z.weight": (z, z), "mixer.x.weight": (x, x), "mixer.bc.weight": (b, c), "mixer.dt.weight": (dt, dt)},
        **{"beside.q.weight": (into, into), "beside.kv.weight": (into * key, into), "ffn.gate_up.weight": (gate, 1.0)},
        **{"mixer.out.weight": (config["ssm_out_multiplier"],) * 2, "ffn.down.weight": (down, down)},
        **{"beside.out.weight": (config["attention_out_multiplier"],) * 2},
    }
    for name, pair in pairs.items():
        rows = times_rows(rows, f"{ours}.{name}", lambda i, pair=pair: pair[i % 2])  # type: ignore[misc]
    return rows


def _entries(config: Config) -> Entries:
    D, rows = config["hidden_size"], parts.ends(config, last="final_layernorm")
    rows = times_rows(rows, "embedding", lambda i: config["embedding_multiplier"])
    if "head.weight" in rows:
        rows = times_rows(rows, "head.weight", lambda i: config["lm_head_multiplier"])
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows[f"{ours}.mixer_norm.weight"] = whole(f"{theirs}.input_layernorm.weight", D)
        rows[f"{ours}.ffn_norm.weight"] = whole(f"{theirs}.pre_ff_layernorm.weight", D)
        rows |= _layer_rows(ours, theirs, config)
    return rows


SIZES: dict[str, Any] = {
    **{"mamba_d_ssm": 1024, "mamba_n_heads": 128, "mamba_d_head": AUTO, "mamba_n_groups": 1, "mamba_d_state": 256},
    **{"mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True, "mamba_norm_before_gate": True},
    **{"mamba_rms_norm": False, "time_step_limit": UNLIMITED[0]},
}
NUMBERS: dict[str, Kind] = {key: listed(NUMBER, "numbers") for key in LISTS}
FALCON_H1 = Architecture(
    name=NAME,
    kind="falcon_h1",
    about="attention beside Mamba-2 in every layer, SwiGLU; its multipliers come out at 1",
    mixers=frozenset({parts.ATTENTION, MIXER}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
        **{"intermediate_size": 14_336, "num_key_value_heads": 8, "head_dim": None, "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 8192, "tie_word_embeddings": False, **SIZES, **ONES},
    },
    fixed={
        **{"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "projectors_bias": False},
        **SSM_FIXED,
    },
    kinds={
        **parts.HEADS,
        **SSM_KINDS,
        **dict.fromkeys(MULTIPLIERS, ABOVE_ZERO),
        **NUMBERS,
        **{"mamba_d_ssm": optional(count()), "mamba_norm_before_gate": FLAG, "mamba_rms_norm": FLAG},
    },
    fits=_fits,
    settled=_settled,
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: (
        mixers == {parts.ATTENTION, MIXER} and any(b.get("beside") for b in model["blocks"].values())
    ),
    beyond=frozenset({"beside"}),
)
