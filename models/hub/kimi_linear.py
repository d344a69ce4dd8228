"""Kimi Linear (2510.26692): Kimi Delta Attention in most layers, latent attention without positions in the others;
SwiGLU in the first layers, then experts as DeepSeek-V3's.

Legend: H heads of the linear layers, K their width, D model width.
"""

from models.hub import decoder, deepseek, sigmoid_moe
from models.hub import layers as parts
from models.hub.architecture import Architecture, Config, Node, layers, must, node, one, ratio, target, with_defaults
from models.hub.mixtral import renamed
from models.hub.rows import TAPS, Entries, ParameterSource, PublishedTensors, joined, whole
from models.hub.tensors import StoredTensor
from models.hub.values import FLAG, WORDS, optional, shown
from models.hub.values import whole as count
from models.mixers.kda import KimiDeltaAttention
from models.mixers.mla import MultiHeadLatentAttention
from models.positions import NoPE

NAME = "KimiLinearForCausalLM"
DELTA, LATENT = target(KimiDeltaAttention), target(MultiHeadLatentAttention)
KINDS = {LATENT: "full_attention", DELTA: "linear_attention"}
LINEAR = {  # a table of the published configuration, and what its keys are called outside of it
    **{"num_heads": "linear_num_heads", "head_dim": "linear_head_dim"},
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
LISTS = {"full_attn_layers": "full_attention", "kda_layers": "linear_attention"}  # of layers' numbers, from 1 on
PLAIN_DELTA = {"negative_eigenvalues": False, "conv_bias": False, "gate_bias": False}
ROUTED = {  # as `sigmoid_moe` names them, and as is written
    **{"n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_token"},
    **{"n_shared_experts": "num_shared_experts", "norm_topk_prob": "moe_renormalize", "n_group": "num_expert_group"},
}


def _settled(config: Config) -> Config:
    """The configuration with the kinds of its layers, and sizes, out of the tables that may have them. Raises
    ValueError."""
    table, settled = config.get("linear_attn_config"), dict(config)
    if table is not None:
        if not isinstance(table, dict):
            raise ValueError(f"config.json: linear_attn_config={shown(table)}: must be a table")
        settled |= {LINEAR[key]: value for key, value in table.items() if key in LINEAR}
        if config.get("layer_types") is None and all(key in table for key in LISTS):
            settled["layer_types"] = _numbered(table, config.get("num_hidden_layers"))
    if (kinds := config.get("mlp_layer_types")) is not None:
        front = kinds.index("sparse") if isinstance(kinds, list) and "sparse" in kinds else len(kinds or ())
        if kinds != ["dense"] * front + ["sparse"] * (len(kinds) - front):
            raise ValueError(f"config.json: mlp_layer_types={shown(kinds)}: must be dense, then sparse")
        settled["first_k_dense_replace"] = front
    return settled


def _numbered(table: Config, number: object) -> list[str]:
    """The kinds of the layers by two lists of their numbers. Raises ValueError."""
    kinds: dict[object, str] = {}
    for key, kind in LISTS.items():
        if not isinstance(table[key], list) or not all(type(n) is int for n in table[key]):
            raise ValueError(f"config.json: linear_attn_config.{key}={shown(table[key])}: must be a list of numbers")
        kinds |= dict.fromkeys(table[key], kind)
    named = [n for key in LISTS for n in table[key]]
    if type(number) is not int or len(named) != number or kinds.keys() != set(range(1, number + 1)):
        raise ValueError(f"config.json: linear_attn_config: must name each of num_hidden_layers={shown(number)} once")
    return [kinds[n] for n in range(1, number + 1)]


def _types(config: Config) -> list[str]:
    """The kinds of the layers. Raises ValueError for a list of others."""
    number, types = config["num_hidden_layers"], config["layer_types"]
    if types is None:
        types = [KINDS[LATENT if i and i % 4 == 0 else DELTA] for i in range(number)]
    if len(types) != number or set(types) - set(KINDS.values()):
        raise ValueError(f"config.json: layer_types={shown(types)}: must be {number} of {', '.join(KINDS.values())}")
    return types


def _body(config: Config) -> Node:
    heads, width, dim = config["linear_num_heads"], config["linear_head_dim"], config["hidden_size"]
    delta = node(
        KimiDeltaAttention,
        heads=heads,
        expand_k=ratio(heads * width, dim),
        expand_v=ratio(heads * width, dim),
        conv=config["linear_conv_kernel_dim"],
        gate_bias=False,
        norm_eps=config["rms_norm_eps"],
    )
    latent = node(
        MultiHeadLatentAttention,
        heads=config["num_attention_heads"],
        rank=config["kv_lora_rank"],
        head_dim=config["qk_nope_head_dim"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        query_rank=config["q_lora_rank"],
        bias=config["attention_bias"],
        positions=node(NoPE, partial=False),
        norm_eps=deepseek.LATENT_EPS,
    )
    mixers = {"linear_attention": ("kda", delta), "full_attention": ("mla", latent)}
    return sigmoid_moe.body(config, [mixers[kind] for kind in _types(config)])


def _delta_keys(path: str, mixer: Node, dim: int) -> Config:
    must(path, mixer, PLAIN_DELTA, NAME)
    if mixer["conv"] is None:
        raise ValueError(f"{path}.conv=null: must be at least 1, as in {NAME}")
    keys, values = int(dim * mixer["expand_k"]), int(dim * mixer["expand_v"])
    if keys != values:
        raise ValueError(f"{path}.expand_v={mixer['expand_v']}: must be expand_k={mixer['expand_k']}, as in {NAME}")
    sizes = {"linear_num_heads": mixer["heads"], "linear_head_dim": keys // mixer["heads"]}
    return sizes | {"linear_conv_kernel_dim": mixer["conv"]}


def _latent_keys(path: str, mixer: Node, dim: int) -> Config:
    must(path, mixer, {"norm_eps": deepseek.LATENT_EPS, "scale": None}, NAME)
    rule = mixer["positions"]
    if not isinstance(rule, dict) or rule["_target_"] != decoder.ROPELESS:
        raise ValueError(f"{path}.positions: must be none, as in {NAME}")
    heads = mixer["heads"]
    width = mixer["head_dim"] or dim // heads
    return {
        **{"num_attention_heads": heads, "num_key_value_heads": heads, "q_lora_rank": mixer["query_rank"]},
        **{"kv_lora_rank": mixer["rank"] or 4 * width, "qk_nope_head_dim": width, "attention_bias": mixer["bias"]},
        **{"qk_rope_head_dim": mixer["rope_dim"] or max(2, width // 4 * 2), "v_head_dim": mixer["value_dim"] or width},
    }


def _express(model: Node) -> Config:
    types, deltas, latents = [], [], []
    for name, section in layers(model):
        path, mixer = f"model.blocks.{name}.mixer", section["mixer"]
        types.append(KINDS[mixer["_target_"]])
        if mixer["_target_"] == DELTA:
            own = with_defaults(mixer, KimiDeltaAttention)
            deltas.append((path, _delta_keys(path, own, model["dim"])))
        else:
            latents.append((path, _latent_keys(path, with_defaults(mixer, MultiHeadLatentAttention), model["dim"])))
    if not deltas or not latents:
        raise ValueError(f"model.pattern=[{','.join(model['pattern'])}]: must have layers of both kinds for {NAME}")
    routed = {ROUTED.get(key, key): value for key, value in sigmoid_moe.keys(model, NAME).items()}
    eps = {"rms_norm_eps": parts.eps_of(model, NAME, {DELTA: KimiDeltaAttention})}
    more = {"layer_types": types, "pad_token_id": None}
    return parts.shapes(model, NAME) | eps | one(latents, NAME) | one(deltas, NAME) | routed | more


def _delta_rows(ours: str, theirs: str, config: Config) -> Entries:
    H, K, D = config["linear_num_heads"], config["linear_head_dim"], config["hidden_size"]
    pairs = {"decay_in": ("f_a", K), "decay_out": ("f_b", H * K), "beta": ("b", H), "out": ("o", D)}
    pairs |= {"gate_in": ("g_a", K), "gate_out": ("g_b", H * K)}
    return {
        f"{ours}.qkv.weight": joined(*((f"{theirs}.{x}_proj.weight", H * K) for x in "qkv")),
        f"{ours}.conv.weight": joined(*((f"{theirs}.{x}_conv1d.weight", H * K) for x in "qkv"), form=TAPS),
        **{f"{ours}.{own}.weight": whole(f"{theirs}.{name}_proj.weight", n) for own, (name, n) in pairs.items()},
        f"{ours}.A_log": whole(f"{theirs}.A_log", H),
        f"{ours}.dt_bias": whole(f"{theirs}.dt_bias", H * K),
        f"{ours}.norm.weight": whole(f"{theirs}.o_norm.weight", K),
    }


def _ffn_rows(ours: str, theirs: str, config: Config, layer: int) -> Entries:
    if not sigmoid_moe.sparse(config)[layer]:
        return sigmoid_moe.rows(ours, f"{theirs}.mlp", config, layer)
    return {
        name: ParameterSource(tuple(p._replace(source=renamed(p.source)) for p in entry.pieces), entry.form)
        for name, entry in sigmoid_moe.rows(ours, f"{theirs}.block_sparse_moe", config, layer).items()
    }


def _entries(config: Config) -> Entries:
    rows, D = parts.ends(config), config["hidden_size"]
    for i, kind in enumerate(_types(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        mixer = _delta_rows if kind == "linear_attention" else deepseek.latent_rows
        rows |= parts.norms(i, D) | mixer(f"{ours}.mixer", f"{theirs}.self_attn", config | {"rope_interleave": False})
        rows |= _ffn_rows(f"{ours}.ffn", theirs, config, i)
    return rows


def _unstacked(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Decays as one row, experts one by one, and dense layers under the name that they are published with:
    `transformers` writes them as if they had experts."""
    tensors = {}
    for name, each in parts.unstacked(stored).items():
        if name.endswith(".A_log") and len(each.shape) == 4:
            each = each._replace(shape=(each.shape[2],))
        layer, found, rest = name.partition(".block_sparse_moe.")
        if found and rest.startswith(("gate_proj.", "up_proj.", "down_proj.")):
            name = f"{layer}.mlp.{rest}"
        tensors[renamed(name)] = each
    return tensors


def _stacked(tensors: PublishedTensors) -> PublishedTensors:
    return {
        name: ((1, 1, *shape, 1), places) if name.endswith(".A_log") else (shape, places)
        for name, (shape, places) in tensors.items()
    }


def _fits(config: Config) -> None:
    deepseek.latents_fit(config)
    sigmoid_moe.fits(config, "num_experts")


KIMI_LINEAR = Architecture(
    name=NAME,
    kind="kimi_linear",
    about="Kimi Delta Attention and latent attention without positions, SwiGLU in the first layers, then experts",
    mixers=frozenset(KINDS),
    defaults={
        **decoder.USUAL,
        **sigmoid_moe.DEFAULTS,
        **{"intermediate_size": 9216, "moe_intermediate_size": 1024, "n_routed_experts": 256, "rms_norm_eps": 1e-5},
        **{"num_experts_per_tok": 8, "routed_scaling_factor": 2.446, "kv_lora_rank": 512, "q_lora_rank": None},
        **{"qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "attention_bias": False},
        **{"linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4, "layer_types": None},
        "max_position_embeddings": 1_048_576,
    },
    fixed={
        **{"hidden_act": "silu", "mla_use_nope": True, "moe_layer_freq": 1},
        "moe_router_activation_func": "sigmoid",
    },
    kinds={
        **parts.HEADS,
        **sigmoid_moe.KINDS,
        **dict.fromkeys((*deepseek.RANKS, *LINEAR.values()), count()),
        **{"q_lora_rank": optional(count()), "attention_bias": FLAG, "layer_types": optional(WORDS)},
    },
    fits=_fits,
    unstacked=_unstacked,
    stacked=_stacked,
    body=_body,
    express=_express,
    entries=_entries,
    suits=lambda model, mixers: mixers == KINDS.keys(),
    aliases={theirs: ours for ours, theirs in ROUTED.items()}
    | {"num_local_experts": "n_routed_experts", "model_max_length": "max_position_embeddings"},
    settled=_settled,
)
