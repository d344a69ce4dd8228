"""DeepSeek-V3 (2412.19437), and Kimi-K2 (2507.20534), which is one: latent attention, SwiGLU in the first layers, then
experts.

Legend: H heads, N channels of a head without positions, P with, V of values, R latent width, Q that of queries.
"""

import math

from models.hub import decoder, positions, sigmoid_moe
from models.hub import layers as parts
from models.hub.architecture import Architecture, Config, Node, layers, must, node, one, target, with_defaults
from models.hub.mtp import behind_the_layers
from models.hub.rows import Entries, ParameterSource, PublishedRows, whole
from models.hub.values import FLAG, optional
from models.hub.values import whole as count
from models.mixers.mla import MultiHeadLatentAttention

NAME = "DeepseekV3ForCausalLM"
MIXER = target(MultiHeadLatentAttention)
LATENT_EPS = 1e-6  # of the latents' norms, whatever the configuration says of the others
RANKS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _sharpened(config: Config, rule: Node, width: int) -> float | None:
    """The factor of the scores, which `mscale_all_dim` enlarges where positions are scaled; null for the usual one."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if "factor" not in rule or not rope.get("mscale_all_dim"):
        return None
    return float(positions.sharpness(rule["factor"], rope["mscale_all_dim"]) ** 2 * width**-0.5)


def _mixer(config: Config) -> Node:
    width, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rule = positions.read(config, rope)
    return node(
        MultiHeadLatentAttention,
        heads=config["num_attention_heads"],
        rank=config["kv_lora_rank"],
        head_dim=width,
        rope_dim=rope,
        value_dim=config["v_head_dim"],
        query_rank=config["q_lora_rank"],
        bias=config["attention_bias"],
        scale=_sharpened(config, rule, width + rope),
        positions=rule,
        norm_eps=LATENT_EPS,
    )


def _body(config: Config) -> Node:
    return sigmoid_moe.body(config, [("mla", _mixer(config))] * config["num_hidden_layers"])


def _express(model: Node) -> Config:
    mapping = []
    for name, section in layers(model):
        path, mixer = f"model.blocks.{name}.mixer", with_defaults(section["mixer"], MultiHeadLatentAttention)
        must(path, mixer, {"norm_eps": LATENT_EPS}, NAME)
        heads = mixer["heads"]
        width = mixer["head_dim"] or model["dim"] // heads
        turned = mixer["rope_dim"] or max(2, width // 4 * 2)
        rope = positions.write(
            path, mixer["positions"] if isinstance(mixer["positions"], dict) else None, NAME, partial=False
        )
        usual = (width + turned) ** -0.5
        if mixer["scale"] is not None and not math.isclose(mixer["scale"], usual, rel_tol=1e-12):
            if rope["rope_type"] == "default" or mixer["scale"] < usual:
                raise ValueError(f"{path}.scale={mixer['scale']}: must be null, or larger with yarn, as in {NAME}")
            sharp = math.sqrt(mixer["scale"] / usual)
            rope |= {"mscale_all_dim": (sharp - 1) / (positions.sharpness(rope["factor"], 1) - 1)}
        keys = {
            **{"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": turned},
            **{"kv_lora_rank": mixer["rank"] or 4 * width, "q_lora_rank": mixer["query_rank"]},
            **{"qk_nope_head_dim": width, "qk_rope_head_dim": turned, "v_head_dim": mixer["value_dim"] or width},
            **{"attention_bias": mixer["bias"], "rope_parameters": rope},
        }
        mapping.append((path, keys))
    eps = {"rms_norm_eps": parts.eps_of(model, NAME)}
    return parts.shapes(model, NAME) | eps | one(mapping, NAME) | sigmoid_moe.keys(model, NAME)


def latent_rows(ours: str, theirs: str, config: Config) -> Entries:
    H, D, R, Q = (config[key] for key in ("num_attention_heads", "hidden_size", "kv_lora_rank", "q_lora_rank"))
    N, P, V = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    turned = P if config["rope_interleave"] else 0

    def rotated(source: str, begin: int) -> list[PublishedRows]:
        return parts.turned(source, begin, P, turned)

    source = f"{theirs}.{'q_proj' if Q is None else 'q_b_proj'}.weight"
    begins = range(0, H * (N + P), N + P)
    heads = [each for b in begins for each in (PublishedRows(source, b, N), *rotated(source, b + N))]
    rows = {
        f"{ours}.q.weight": ParameterSource(tuple(heads)),
        f"{ours}.kv_norm.weight": whole(f"{theirs}.kv_a_layernorm.weight", R),
        f"{ours}.kv_b.weight": whole(f"{theirs}.kv_b_proj.weight", H * (N + V)),
        f"{ours}.out.weight": whole(f"{theirs}.o_proj.weight", D),
    }
    for leaf in ("weight", "bias") if config["attention_bias"] else ("weight",):
        into = f"{theirs}.kv_a_proj_with_mqa.{leaf}"
        rows[f"{ours}.kv_a.{leaf}"] = ParameterSource((PublishedRows(into, 0, R), *rotated(into, R)))
        if Q is not None:
            rows[f"{ours}.q_a.{leaf}"] = whole(f"{theirs}.q_a_proj.{leaf}", Q)
    if Q is not None:
        rows[f"{ours}.q_norm.weight"] = whole(f"{theirs}.q_a_layernorm.weight", Q)
    if config["attention_bias"]:
        rows[f"{ours}.out.bias"] = whole(f"{theirs}.o_proj.bias", D)
    return rows


def latents_fit(config: Config) -> None:
    """Raises ValueError for keys of latent attention that are none together."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"] or config["num_attention_heads"]
    if heads != groups:
        raise ValueError(f"config.json: num_key_value_heads={groups}: must be num_attention_heads={heads}")
    wide = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    if wide > 4 * decoder.LARGE:
        raise ValueError(f"config.json: qk_rope_head_dim={config['qk_rope_head_dim']}: is too much for {heads} heads")


def _fits(config: Config) -> None:
    turned = config["qk_rope_head_dim"]
    if config["head_dim"] not in (None, turned):
        raise ValueError(f"config.json: head_dim={config['head_dim']}: must be qk_rope_head_dim={turned}, or absent")
    latents_fit(config)
    sigmoid_moe.fits(config)


DEEPSEEK_V3 = Architecture(
    name=NAME,
    kind="deepseek_v3",
    other_kinds=("kimi_k2",),
    about="latent attention, SwiGLU in the first layers, then experts in groups; Kimi-K2 goes out as this",
    mixers=frozenset({MIXER}),
    defaults={
        **decoder.USUAL,
        **sigmoid_moe.DEFAULTS,
        **{"intermediate_size": 18_432, "moe_intermediate_size": 2048, "n_routed_experts": 256},
        **{"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
        **{"first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "qk_nope_head_dim": 128, "max_position_embeddings": 4096, "attention_bias": False},
        "rope_interleave": True,
    },
    fixed={"hidden_act": "silu"},
    kinds={
        **parts.HEADS,
        **sigmoid_moe.KINDS,
        **dict.fromkeys(RANKS, count()),
        **{"q_lora_rank": optional(count()), "attention_bias": FLAG, "rope_interleave": FLAG},
    },
    fits=_fits,
    unstacked=parts.unstacked,
    body=_body,
    express=_express,
    entries=decoder.entries(latent_rows, sigmoid_moe.rows),
    suits=lambda model, mixers: mixers == {MIXER},
    mtp=behind_the_layers({"first_k_dense_replace": 0}),
    aliases={"num_mtp_layers": "num_nextn_predict_layers"},
)
