"""Bamba: Mamba-2 (2405.21060) in most layers, attention of which half a head is rotated in the others, SwiGLU in all.

Granite 4 has the same mixers; what they share is here.
"""

from models.ffn import SwiGLU
from models.hub import layers as parts
from models.hub.architecture import REQUIRED, Architecture, Config, Node, layers, must, node, one, ratio, with_defaults
from models.hub.decoder import only_dense
from models.hub.mamba2 import MIXER, PLAIN_SSM, UNLIMITED, mixer_rows
from models.hub.rows import Entries, ParameterSource, scaled, whole
from models.hub.values import FLAG, Kind, listed, optional, shown
from models.hub.values import whole as count
from models.mixers.mamba2 import Mamba2

NAME = "BambaForCausalLM"
AUTO = "auto"
SSM = ("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_expand")
SSM_DEFAULTS: Config = {
    **{"mamba_n_heads": 128, "mamba_d_head": AUTO, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4},
    **{"mamba_expand": 2, "mamba_conv_bias": True, "time_step_limit": UNLIMITED[0]},
}
SSM_FIXED = {"mamba_proj_bias": False}
SSM_KINDS: dict[str, Kind] = {
    **dict.fromkeys(SSM, count()),
    "mamba_d_head": Kind(f"{AUTO}, or {count().words}", lambda v: v == AUTO or count().holds(v)),
    "mamba_conv_bias": FLAG,
}


def ssm_fits(config: Config) -> None:
    """Raises ValueError for heads of Mamba-2 that are none, and for step sizes with a limit."""
    heads, inner = config["mamba_n_heads"], config["mamba_expand"] * config["hidden_size"]
    width = config["mamba_d_head"]
    if inner % heads or width not in (AUTO, inner // heads):
        raise ValueError(
            f"config.json: mamba_n_heads={heads}: must be mamba_expand * hidden_size={inner} / mamba_d_head={width}"
        )
    if heads % config["mamba_n_groups"]:
        raise ValueError(f"config.json: mamba_n_groups={config['mamba_n_groups']}: must divide mamba_n_heads={heads}")
    if config["time_step_limit"] not in UNLIMITED:
        raise ValueError(f"config.json: time_step_limit={shown(config['time_step_limit'])}: must be [0, Infinity]")


def ssm(config: Config) -> Node:
    """A section of Mamba-2."""
    dim = config["hidden_size"]
    return node(
        Mamba2,
        heads=config["mamba_n_heads"],
        expand=ratio(config["mamba_expand"] * dim, dim),
        state=config["mamba_d_state"],
        groups=config["mamba_n_groups"],
        conv=config["mamba_d_conv"],
        conv_bias=config["mamba_conv_bias"],
        norm_eps=config["rms_norm_eps"],
    )


def ssm_keys(model: Node, who: str) -> Config:
    """The keys of a config.json for all layers of Mamba-2, {} without any. Raises ValueError where they differ."""
    mapping, dim = [], model["dim"]
    for name, section in layers(model):
        if section["mixer"]["_target_"] == MIXER:
            path, mixer = f"model.blocks.{name}.mixer", with_defaults(section["mixer"], Mamba2)
            must(path, mixer, PLAIN_SSM, who)
            if not float(mixer["expand"]).is_integer():
                raise ValueError(f"{path}.expand={mixer['expand']}: must be a whole number, as in {who}")
            keys = {"mamba_n_heads": mixer["heads"], "mamba_d_head": int(dim * mixer["expand"]) // mixer["heads"]}
            keys |= {"mamba_n_groups": mixer["groups"], "mamba_d_state": mixer["state"], "mamba_d_conv": mixer["conv"]}
            mapping.append((path, keys | {"mamba_expand": int(mixer["expand"]), "mamba_conv_bias": mixer["conv_bias"]}))
    return one(mapping, who) or {}


def ssm_rows(ours: str, theirs: str, config: Config, residual: float = 1.0) -> Entries:
    """The rows of a layer of Mamba-2. residual: factor of its output."""
    dim, heads = config["hidden_size"], config["mamba_n_heads"]
    rows = mixer_rows(
        ours,
        theirs,
        dim=dim,
        heads=heads,
        inner=config["mamba_expand"] * dim,
        groups=config["mamba_n_groups"],
        state=config["mamba_d_state"],
        conv_bias=config["mamba_conv_bias"],
    )
    return times(rows, f"{ours}.out.weight", residual)


def times(rows: Entries, name: str, factor: float) -> Entries:
    """The same rows, one parameter's times a factor."""
    pieces, form = rows[name]
    return rows | {name: ParameterSource(pieces, scaled(form, factor))}


def attends(config: Config) -> list[bool]:
    """Says of each layer whether it is attention. Raises ValueError for a layer that is not there."""
    number, indices = config["num_hidden_layers"], config["attn_layer_indices"] or []
    if beyond := [i for i in indices if i >= number]:
        raise ValueError(f"config.json: attn_layer_indices={shown(indices)}: {beyond[0]} must be below {number}")
    return [i in indices for i in range(number)]


def _body(config: Config) -> Node:
    eps, ffn = config["rms_norm_eps"], node(SwiGLU, hidden=config["intermediate_size"])
    mixers = {"attn": parts.attention(_rotary(config), fraction=0.5), "mamba": ssm(config)}
    blocks = {name: parts.block(mixer, ffn, eps) for name, mixer in mixers.items()}
    return parts.stack(config, ["attn" if each else "mamba" for each in attends(config)], blocks, eps)


def _rotary(config: Config) -> Config:
    """The configuration without a key that its reader overwrites."""
    return {key: value for key, value in config.items() if key != "partial_rotary_factor"}


def attention_keys(model: Node, who: str, *, partial: bool) -> Config:
    """The keys of a config.json for all attention layers. Raises ValueError without any: the cache of `transformers`
    asks one for the length. partial: as in `positions.write`."""
    keys = parts.attention_keys(model, who, partial=partial, window=None, qk_norm=False, gate=False)
    if not keys:
        raise ValueError(f"model.pattern=[{','.join(model['pattern'])}]: must have a layer of attention for {who}")
    del keys["sliding_window"]
    return keys


def _express(model: Node) -> Config:
    keys = attention_keys(model, NAME, partial=True)
    indices = [i for i, (_, block) in enumerate(layers(model)) if block["mixer"]["_target_"] == parts.ATTENTION]
    eps = {"rms_norm_eps": parts.eps_of(model, NAME, {MIXER: Mamba2})}
    more = {"attn_layer_indices": indices, "pad_token_id": None}
    return parts.shapes(model, NAME) | eps | keys | ssm_keys(model, NAME) | only_dense(model, NAME) | more


def _entries(config: Config) -> Entries:
    D, hidden = config["hidden_size"], config["intermediate_size"]
    rows = parts.ends(config, last="final_layernorm")
    for i, attention in enumerate(attends(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows[f"{ours}.mixer_norm.weight"] = whole(f"{theirs}.input_layernorm.weight", D)
        rows[f"{ours}.ffn_norm.weight"] = whole(f"{theirs}.pre_ff_layernorm.weight", D)
        if attention:
            rows |= parts.attention_rows(f"{ours}.mixer", f"{theirs}.self_attn", config)
        else:
            rows |= ssm_rows(f"{ours}.mixer", f"{theirs}.mamba", config)
        rows |= parts.dense_rows(f"{ours}.ffn", f"{theirs}.feed_forward", hidden, D)
    return rows


def _fits(config: Config) -> None:
    parts.heads_fit(config)
    ssm_fits(config)


BAMBA = Architecture(
    name=NAME,
    kind="bamba",
    about="Mamba-2 and attention of which half a head is rotated, SwiGLU",
    mixers=frozenset({parts.ATTENTION, MIXER}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), REQUIRED),
        **SSM_DEFAULTS,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": False,
        "attn_layer_indices": None,
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, **SSM_FIXED},
    kinds={
        **parts.HEADS,
        **SSM_KINDS,
        "attn_layer_indices": optional(listed(count(0), "whole numbers")),
    },
    fits=_fits,
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: mixers == {parts.ATTENTION, MIXER},
)
