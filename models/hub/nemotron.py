"""Nemotron (2407.14679, 2406.11704): LayerNorm with biases, weights about zero, and relu² between two matrices; half of
each head rotated. And Nemotron-H (2504.03624): layers that are Mamba-2, attention without positions, a feed-forward of
relu², or experts of relu², alone."""

from typing import Any

from models.ffn import MLP
from models.hub import decoder
from models.hub import layers as parts
from models.hub.arcee import SQUARED, squared_keys, squared_rows
from models.hub.architecture import (
    NO_MIXER,
    REQUIRED,
    Architecture,
    Config,
    Node,
    layers,
    must,
    node,
    one,
    ratio,
    with_defaults,
)
from models.hub.mamba2 import MIXER, UNLIMITED, mixer_rows
from models.hub.rows import ABOUT_ZERO, Entries, experts, joined, whole
from models.hub.sigmoid_moe import RATE, RULES
from models.hub.sigmoid_moe import fits as experts_fit
from models.hub.tensors import StoredTensor, rows_of
from models.hub.values import ABOVE_ZERO, FLAG, WORDS, Kind, optional, shown
from models.hub.values import whole as count
from models.mixers.mamba2 import Mamba2
from models.moe import MoE
from models.positions import NoPE

NAME, HYBRID = "NemotronForCausalLM", "NemotronHForCausalLM"


def _body(config: Config) -> Node:
    bias = config["attention_bias"]
    mixer = parts.attention(config, fraction=0.5, qkv_bias=bias, out_bias=bias)
    ffn = node(MLP, hidden=config["intermediate_size"], activation="relu2", bias=config["mlp_bias"])
    model = decoder.alike(config, mixer, ffn, norm="layer")
    return model | {"blocks": {name: block | {"norm": "layer"} for name, block in model["blocks"].items()}}


def _express(model: Node) -> Config:
    must("model", {"norm": "rms"} | model, {"norm": "layer"}, NAME)
    for name, block in layers(model):
        must(f"model.blocks.{name}", {"norm": "rms"} | block, {"norm": "layer"}, NAME)
    bias = decoder.first(model, "qkv_bias")
    flags: dict[str, Any] = {"qk_norm": False, "gate": False, "window": None, "qkv_bias": bias, "out_bias": bias}
    keys = parts.attention_keys(model, NAME, partial=True, **flags)
    del keys["sliding_window"]
    more = {"norm_eps": parts.eps_of(model, NAME), "attention_bias": bias}
    return parts.shapes(model, NAME) | keys | squared_keys(model, NAME) | more


def _rows(ours: str, theirs: str, config: Config) -> Entries:
    bias = config["attention_bias"]
    return parts.attention_rows(ours, theirs, config, bias=bias, out_bias=bias)


def _entries(config: Config) -> Entries:
    D, rows = config["hidden_size"], decoder.entries(_rows, squared_rows, form=ABOUT_ZERO)(config)
    for i in range(config["num_hidden_layers"]):
        for own, name in decoder.PRE.items():
            rows[f"layers.{i}.{own}.bias"] = whole(f"model.layers.{i}.{name}.bias", D)
    return rows | {"norm.bias": whole("model.norm.bias", D)}


NEMOTRON = decoder.architecture(
    NAME,
    "nemotron",
    about="attention of which half a head is rotated, relu², LayerNorm with biases",
    defaults={
        **decoder.USUAL,
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "attention_bias": False, "mlp_bias": False},
    },
    fixed={"hidden_act": "relu2"},
    kinds=parts.HEADS | {"attention_bias": FLAG, "mlp_bias": FLAG},
    body=_body,
    express=_express,
    entries=_entries,
    aliases={"norm_eps": "rms_norm_eps"},
    beyond=frozenset({"norm"}),
)


# --- Nemotron-H

WORDS_OF = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLDER = {"mamba": "linear_attention", "attention": "full_attention"}
NAMES = {"linear_attention": "mamba", "full_attention": "attn", "mlp": "mlp", "moe": "moe"}
SSM = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")
MOE = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size")


def _settled(config: Config) -> Config:
    """The configuration with the types of its layers, from an older key, and with their number."""
    types = config.get("layers_block_type")
    if types is None and isinstance(pattern := config.get("hybrid_override_pattern"), str):
        types = [WORDS_OF.get(letter, letter) for letter in pattern]
    if not isinstance(types, list) or not WORDS.holds(types):
        raise ValueError(f"config.json: layers_block_type={shown(types)}: must be {WORDS.words}")
    types = [OLDER.get(each, each) for each in types]
    if not types or set(types) - NAMES.keys():
        raise ValueError(f"config.json: layers_block_type={shown(types)}: must be of {', '.join(NAMES)}")
    return config | {"layers_block_type": types, "num_hidden_layers": len(types)}


def _moe(config: Config) -> Node:
    groups = config["n_group"] or 1
    return node(
        MoE,
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        hidden=config["moe_intermediate_size"],
        expert="relu2",
        latent=config["moe_latent_size"],
        shared_hidden=config["moe_shared_expert_intermediate_size"],
        router="sigmoid",
        renormalise=config["norm_topk_prob"],
        scale=float(config["routed_scaling_factor"]),
        bias_rate=RATE,
        expert_groups=groups,
        top_groups=config["topk_group"] if groups > 1 else 1,
    )


def _hybrid_body(config: Config) -> Node:
    eps, dim = config["rms_norm_eps"], config["hidden_size"]
    mamba = node(
        Mamba2,
        heads=config["mamba_num_heads"],
        expand=ratio(config["mamba_num_heads"] * config["mamba_head_dim"], dim),
        state=config["ssm_state_size"],
        groups=config["n_groups"],
        conv=config["conv_kernel"],
        conv_bias=config["use_conv_bias"],
        dt_min=float(config["time_step_min"]),
        norm_eps=eps,
    )
    plain = {key: value for key, value in config.items() if key != "partial_rotary_factor"}
    attention = parts.attention(plain | {"rope_parameters": None, "rope_scaling": None})
    attention["positions"] = node(NoPE, partial=False)
    mlp = node(MLP, hidden=config["intermediate_size"], activation="relu2", bias=config["mlp_bias"])
    made: dict[str, tuple[Node | None, Node | None]] = {
        "mamba": (mamba, None),
        "attn": (attention, None),
        "mlp": (None, mlp),
        "moe": (None, _moe(config)),
    }
    blocks = {name: parts.block(mixer, ffn, eps) for name, (mixer, ffn) in made.items()}
    return parts.stack(config, [NAMES[each] for each in config["layers_block_type"]], blocks, eps)


def _kind(name: str, block: Node) -> str:
    """The type of a layer. Raises ValueError for one that has two parts, or another one."""
    path, mixer, ffn = f"model.blocks.{name}", block["mixer"]["_target_"], (block["ffn"] or {}).get("_target_")
    kinds: dict[tuple[str, str | None], str] = {
        (MIXER, None): "linear_attention",
        (parts.ATTENTION, None): "full_attention",
    }
    kinds |= {(NO_MIXER, SQUARED): "mlp", (NO_MIXER, parts.MIXTURE): "moe"}
    if (mixer, ffn) not in kinds:
        raise ValueError(f"{path}: must be Mamba2, Attention, MLP or MoE alone in a layer for {HYBRID}")
    return kinds[mixer, ffn]


def _hybrid_express(model: Node) -> Config:
    types = [_kind(name, block) for name, block in layers(model)]
    for path, mixer in decoder.attentions(model):
        if decoder.rotates(mixer):
            raise ValueError(f"{path}.positions: must be NoPE, as in {HYBRID}")
    same = decoder.changed(model, lambda mixer: {"positions": None})
    keys = parts.attention_keys(same, HYBRID, window=None, qk_norm=False, gate=False)
    if not keys:  # the cache of `transformers` asks one for the length
        raise ValueError(f"model.pattern=[{','.join(model['pattern'])}]: must have a layer of attention for {HYBRID}")
    del keys["sliding_window"], keys["rope_parameters"]
    found: dict[str, list[tuple[str, Config]]] = {kind: [] for kind in NAMES}
    for kind, (name, block) in zip(types, layers(model), strict=True):
        path = f"model.blocks.{name}"
        if kind == "linear_attention":
            found[kind].append((f"{path}.mixer", _ssm_keys(f"{path}.mixer", block["mixer"], model["dim"])))
        elif kind == "mlp":
            mlp = with_defaults(block["ffn"], MLP)
            must(f"{path}.ffn", mlp, {"activation": "relu2"}, HYBRID)
            found[kind].append((f"{path}.ffn", {"intermediate_size": mlp["hidden"], "mlp_bias": mlp["bias"]}))
        elif kind == "moe":
            found[kind].append((f"{path}.ffn", _moe_keys(f"{path}.ffn", block["ffn"])))
    own = [one(each, HYBRID) or {} for each in found.values()]
    more = {"layer_norm_epsilon": parts.eps_of(model, HYBRID, {MIXER: Mamba2}), "layers_block_type": types}
    sizes = parts.shapes(model, HYBRID)
    del sizes["num_hidden_layers"]
    return sizes | keys | own[0] | own[2] | own[3] | more | {"pad_token_id": None}


def _ssm_keys(path: str, section: Node, dim: int) -> Config:
    mixer = with_defaults(section, Mamba2)
    must(path, mixer, {"out_norm": "gated"}, HYBRID)
    widths = (mixer["heads"], int(dim * mixer["expand"]) // mixer["heads"], mixer["state"], mixer["groups"])
    flags = {"use_conv_bias": mixer["conv_bias"], "time_step_min": mixer["dt_min"]}
    return dict(zip(SSM, (*widths, mixer["conv"]), strict=True)) | flags


def _moe_keys(path: str, section: Node) -> Config:
    moe = with_defaults(section, MoE)
    fixed = {"router": "sigmoid", "expert": "relu2", "bias": False, "shared_gate": False, "capacity_factor": None}
    must(path, moe, fixed, HYBRID)
    for key in ("bias_rate", "shared_hidden"):
        if not moe[key]:
            raise ValueError(f"{path}.{key}={moe[key]:g}: must be above 0, as in {HYBRID}")
    widths = (moe["num_experts"], moe["top_k"], moe["hidden"], moe["shared_hidden"])
    flags = {"norm_topk_prob": moe["renormalise"], "routed_scaling_factor": moe["scale"]}
    groups = {"n_group": moe["expert_groups"], "topk_group": moe["top_groups"]}
    return dict(zip(MOE, widths, strict=True)) | flags | groups | {"moe_latent_size": moe["latent"]}


def _moe_rows(ours: str, theirs: str, config: Config) -> Entries:
    E, hidden, dim = config["n_routed_experts"], config["moe_intermediate_size"], config["hidden_size"]
    up, down = ([(f"{theirs}.experts.{e}.{name}_proj.weight") for e in range(E)] for name in ("up", "down"))
    shared, beside = f"{theirs}.shared_experts", config["moe_shared_expert_intermediate_size"]
    latent = config["moe_latent_size"]
    around = {
        f"{ours}.latent_in.weight": whole(f"{theirs}.fc1_latent_proj.weight", latent or 0),
        f"{ours}.latent_out.weight": whole(f"{theirs}.fc2_latent_proj.weight", dim),
    }
    return ({} if latent is None else around) | {
        f"{ours}.router.weight": whole(f"{theirs}.gate.weight", E),
        f"{ours}.router.selection_bias": whole(f"{theirs}.gate.e_score_correction_bias", E),
        f"{ours}.experts.gate_up": joined(*((name, hidden) for name in up), form=experts(hidden)),
        f"{ours}.experts.down": joined(*((name, latent or dim) for name in down), form=experts(latent or dim)),
        f"{ours}.shared.up.weight": whole(f"{shared}.up_proj.weight", beside),
        f"{ours}.shared.down.weight": whole(f"{shared}.down_proj.weight", dim),
    }


def _hybrid_entries(config: Config) -> Entries:
    D, H = config["hidden_size"], config["mamba_num_heads"]
    sizes = {"dim": D, "heads": H, "inner": H * config["mamba_head_dim"], "groups": config["n_groups"]}
    sizes |= {"state": config["ssm_state_size"], "conv_bias": config["use_conv_bias"]}
    rows = parts.ends(config, body="backbone", embed="embeddings", last="norm_f")
    for i, kind in enumerate(config["layers_block_type"]):
        ours, theirs = f"layers.{i}", f"backbone.layers.{i}.mixer"
        mixes = kind in ("linear_attention", "full_attention")
        norm = f"{ours}.{'mixer' if mixes else 'ffn'}_norm.weight"
        rows[norm] = whole(f"backbone.layers.{i}.norm.weight", D)
        if kind == "linear_attention":
            rows |= mixer_rows(f"{ours}.mixer", theirs, **sizes)
        elif kind == "full_attention":
            rows |= parts.attention_rows(f"{ours}.mixer", theirs, config)
        elif kind == "mlp":
            rows |= squared_rows(f"{ours}.ffn", theirs, config, i)
        else:
            rows |= _moe_rows(f"{ours}.ffn", theirs, config)
    return rows


def _hybrid_fits(config: Config) -> None:
    parts.heads_fit(config)
    heads = config["mamba_num_heads"]
    if heads % config["n_groups"]:
        raise ValueError(f"config.json: n_groups={config['n_groups']}: must divide mamba_num_heads={heads}")
    if config["time_step_min"] >= 1:
        raise ValueError(f"config.json: time_step_min={config['time_step_min']}: must be below 1")
    if config["time_step_limit"] not in UNLIMITED:
        raise ValueError(f"config.json: time_step_limit={shown(config['time_step_limit'])}: must be [0, Infinity]")
    if "moe" in config["layers_block_type"]:
        if config["mlp_bias"]:
            raise ValueError("config.json: mlp_bias=true: must be false with layers of experts")
        experts_fit(config)


def _unstacked(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Experts one by one, where they lie as `transformers` holds them in memory, and under the published names."""
    tensors = {}
    for name, each in stored.items():
        name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        stem, _, last = name.rpartition(".")
        if stem.endswith(".experts") and last in ("up_proj", "down_proj") and len(each.shape) == 3:
            for e in range(each.shape[0]):
                tensors[f"{stem}.{e}.{last}.weight"] = rows_of(each, e * each.shape[1], each.shape[1])
        else:
            tensors[name] = each
    return tensors


NONNEGATIVE = Kind("a number of at least 0", lambda v: type(v) in (int, float) and 0 <= v < 1e300)
NEMOTRON_H = Architecture(
    name=HYBRID,
    kind="nemotron_h",
    about="layers of Mamba-2, attention without positions, relu² or experts of relu², each alone",
    mixers=frozenset({parts.ATTENTION, MIXER, NO_MIXER}),
    defaults={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads"), REQUIRED),
        **{"intermediate_size": 21_504, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 4096, "tie_word_embeddings": False, "mlp_bias": False},
        **dict(zip(SSM, (128, 64, 128, 8, 4), strict=True)),
        **{"use_conv_bias": True, "time_step_min": 0.001, "time_step_limit": UNLIMITED[0]},
        **dict(zip(MOE, (8, 2, 7688, 7688), strict=True)),
        "moe_latent_size": None,
        **{"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
    },
    fixed={
        **{"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"},
        **{"attention_bias": False, "use_bias": False, "mamba_proj_bias": False},
    },
    kinds={
        **parts.HEADS,
        **dict.fromkeys((*SSM, *MOE), count()),
        **RULES,
        **{"layers_block_type": WORDS, "mlp_bias": FLAG, "use_conv_bias": FLAG, "time_step_min": NONNEGATIVE},
        **{"routed_scaling_factor": ABOVE_ZERO, "moe_latent_size": optional(count())},
    },
    fits=_hybrid_fits,
    settled=_settled,
    unstacked=_unstacked,
    body=_hybrid_body,
    express=_hybrid_express,
    entries=_hybrid_entries,
    suits=lambda model, mixers: NO_MIXER in mixers and mixers <= {parts.ATTENTION, MIXER, NO_MIXER},
    aliases={"layer_norm_epsilon": "rms_norm_eps", "layer_types": "layers_block_type"}
    | {"num_local_experts": "n_routed_experts"},
    left_out=("mtp.",),  # of multi-token prediction
)
