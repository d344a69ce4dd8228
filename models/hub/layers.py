"""Parts that several architectures share: their sections, and the rows of their tensors.

Legend: H heads, G heads of keys and values, K head width, E experts.
"""

import math
from collections.abc import Mapping
from typing import Any

from models.block import Block
from models.ffn import SwiGLU
from models.hub import positions
from models.hub.architecture import Config, Node, fold, layers, must, node, one, target, with_defaults
from models.hub.rows import (
    PLAIN,
    Entries,
    Form,
    ParameterSource,
    PublishedRows,
    PublishedTensors,
    experts,
    joined,
    whole,
)
from models.hub.tensors import StoredTensor, rows_of
from models.hub.values import FLAG, Kind, listed, optional
from models.hub.values import whole as count
from models.lm import LM
from models.mixers.attention import Attention
from models.moe import MoE

ATTENTION, DENSE, MIXTURE = target(Attention), target(SwiGLU), target(MoE)


def stack(config: Config, kinds: list[str], blocks: dict[str, Node], eps: float) -> Node:
    """The `model` section of these layers, kind by kind."""
    tied = config["tie_word_embeddings"]
    return node(
        LM,
        partial=False,
        vocabulary=config["vocab_size"],
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        pattern=fold(kinds),
        blocks={name: block for name, block in blocks.items() if name in kinds},
        tied=tied,
        tied_scale=1.0 if tied else None,
        norm_eps=eps,
    )


def block(mixer: Node | None, ffn: Node | None, eps: float, norms: str = "pre") -> Node:
    return node(Block, mixer=mixer, ffn=ffn, norms=norms, norm_eps=eps)


def shapes(model: Node, who: str, *, embedding_scale: float = 1.0) -> Config:
    """The keys of a config.json for the model as a whole. Raises ValueError."""
    scale = model.get("embedding_scale", 1.0)
    if not math.isclose(scale, embedding_scale, rel_tol=1e-12):
        raise ValueError(f"model.embedding_scale={scale:g}: must be {embedding_scale:g}, as in {who}")
    return {
        "vocab_size": model["vocabulary"],
        "hidden_size": model["dim"],
        "num_hidden_layers": model["layers"],
        "tie_word_embeddings": bool(model.get("tied")),
    }


def eps_of(model: Node, who: str, mixers: Mapping[str, type] = {}, *, norms: str = "pre") -> float:  # noqa: B006
    """The eps of all norms, those of these mixers too, by `_target_`. norms: their place in all blocks. Raises
    ValueError where they differ."""
    keys = [("model.norm_eps", model.get("norm_eps", 1e-5))]
    for name, block in layers(model):
        must(f"model.blocks.{name}", {"norms": "pre"} | block, {"norms": norms}, who)
        keys.append((f"model.blocks.{name}.norm_eps", block.get("norm_eps", 1e-5)))
        if kind := mixers.get(block["mixer"]["_target_"]):
            keys.append((f"model.blocks.{name}.mixer.norm_eps", with_defaults(block["mixer"], kind)["norm_eps"]))
    return one(keys, who)


# --- softmax attention


PLAIN_ATTENTION = {"sinks": 0, "norm_heads": "each", "qkv_bias": False, "out_bias": False, "scale": None}
PLAIN_ATTENTION |= {"softcap": None, "sink_logits": False}
HEADS: dict[str, Kind] = dict.fromkeys(("num_key_value_heads", "head_dim"), optional(count()))


def attention(config: Config, *, fraction: float | None = None, **fixed: Any) -> Node:
    """A section of attention, of a config.json. fraction: as in `positions.read`."""
    heads = config["num_attention_heads"]
    return node(
        Attention,
        heads=heads,
        kv_heads=config["num_key_value_heads"] or heads,
        head_dim=_width(config),
        positions=positions.read(config, _width(config), fraction),
        **fixed,
    )


def _width(config: Config) -> int:
    """Channels of a head."""
    return config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]


def heads_fit(config: Config, *, divided: bool = False) -> None:
    """Raises ValueError for heads that are none. divided: whether they must share out the model's width anyway."""
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    groups = config["num_key_value_heads"] or heads
    if heads % groups:
        raise ValueError(f"config.json: num_key_value_heads={groups}: must divide num_attention_heads={heads}")
    if dim % heads and (divided or config["head_dim"] is None):
        raise ValueError(f"config.json: num_attention_heads={heads}: must divide hidden_size={dim}")


def attention_keys(model: Node, who: str, *, partial: bool = False, **fixed: Any) -> Config:
    """The keys of a config.json for all attention layers, {} without any. partial: as in `positions.write`. Raises
    ValueError where they differ, or for another `fixed`."""
    mapping = []
    for name, section in layers(model):
        if section["mixer"]["_target_"] != ATTENTION:
            continue
        path, mixer = f"model.blocks.{name}.mixer", with_defaults(section["mixer"], Attention)
        must(path, mixer, PLAIN_ATTENTION | fixed, who)
        heads, rope = mixer["heads"], mixer["positions"] if isinstance(mixer["positions"], dict) else None
        keys = {
            "num_attention_heads": heads,
            "num_key_value_heads": mixer["kv_heads"] or heads,
            "head_dim": mixer["head_dim"] or model["dim"] // heads,
            "sliding_window": mixer["window"],
            "rope_parameters": positions.write(path, rope, who, partial=partial),
        }
        mapping.append((path, keys))
    return one(mapping, who) or {}


def attention_rows(
    ours: str,
    theirs: str,
    config: Config,
    *,
    gate: bool = False,
    norm: Form | None = None,
    joint: bool = False,
    bias: bool = False,
    out_bias: bool = False,
    interleaved: int = 0,
    names: Mapping[str, str] = {},  # noqa: B006 it is read only
) -> Entries:
    """A layer's attention. gate: whether the queries' rows lie head by head beside the gate's. norm: the form of the
    norms of queries and keys. joint: whether those are of all heads together. bias: of queries, keys and values.
    interleaved: channels of a head that rotate in pairs 2i and 2i + 1 there, i and half of them further on here.
    names: of tensors that have others than Llama's."""
    H = config["num_attention_heads"]
    G, D = config["num_key_value_heads"] or H, config["hidden_size"]
    K = config["head_dim"] or D // H
    rows: Entries = {f"{ours}.out.weight": whole(f"{theirs}.{names.get('o_proj', 'o_proj')}.weight", D)}
    if out_bias:
        rows[f"{ours}.out.bias"] = whole(f"{theirs}.o_proj.bias", D)
    for leaf in ("weight", "bias") if bias else ("weight",):
        q, k, v = (f"{theirs}.{name}_proj.{leaf}" for name in "qkv")
        kv = [each for g in range(G) for each in (*turned(k, g * K, K, interleaved), PublishedRows(v, g * K, K))]
        rows[f"{ours}.kv.{leaf}"] = ParameterSource(tuple(kv))
        if gate:
            rows[f"{ours}.q.{leaf}"] = ParameterSource(tuple(PublishedRows(q, 2 * h * K, K) for h in range(H)))
            rows[f"{ours}.gate.{leaf}"] = ParameterSource(tuple(PublishedRows(q, (2 * h + 1) * K, K) for h in range(H)))
        elif interleaved:
            heads = [each for h in range(H) for each in turned(q, h * K, K, interleaved)]
            rows[f"{ours}.q.{leaf}"] = ParameterSource(tuple(heads))
        else:
            rows[f"{ours}.q.{leaf}"] = whole(q, H * K)
    if norm is not None:
        wide = {"q": H * K, "k": G * K} if joint else {"q": K, "k": K}
        for x, width in wide.items():
            own = names.get(f"{x}_norm", f"{x}_norm")
            rows[f"{ours}.{x}_norm.weight"] = whole(f"{theirs}.{own}.weight", width, norm)
    return rows


def turned(source: str, begin: int, width: int, interleaved: int) -> list[PublishedRows]:
    """The rows of a head whose rotated channels lie in pairs, in our order."""
    if not interleaved:
        return [PublishedRows(source, begin, width)]
    order = (*range(0, interleaved, 2), *range(1, interleaved, 2))
    rest = [PublishedRows(source, begin + interleaved, width - interleaved)] if interleaved < width else []
    return [*(PublishedRows(source, begin + row, 1) for row in order), *rest]


# --- feed-forwards


def hidden(path: str, ffn: Node, who: str, *, activation: str = "silu", bias: bool = False) -> int:
    """The width of a SwiGLU. Raises ValueError for another activation, and for biases or none."""
    section = with_defaults(ffn, SwiGLU)
    must(path, section, {"activation": activation, "bias": bias}, who)
    return int(section["hidden"])


def sparse(config: Config) -> list[bool]:
    """Finds the layers that have experts, from `decoder_sparse_step` and `mlp_only_layers`."""
    step, dense = config["decoder_sparse_step"], set(config["mlp_only_layers"] or ())
    layers = range(config["num_hidden_layers"])
    return [config["num_experts"] > 0 and i not in dense and (i + 1) % step == 0 for i in layers]


PLAIN_MIXTURE = {
    **{"router": "softmax", "scale": 1.0, "bias_rate": 0.0, "expert_groups": 1, "capacity_factor": None},
    **{"expert": "swiglu", "bias": False, "latent": None},
}
EXPERTS: dict[str, Kind] = {
    "num_experts": count(0),
    "num_experts_per_tok": count(),
    "moe_intermediate_size": count(),
    "norm_topk_prob": FLAG,
    "decoder_sparse_step": count(),
    "mlp_only_layers": optional(listed(count(0), "whole numbers")),
}


def experts_fit(config: Config) -> None:
    """Raises ValueError for a choice of experts that is none, where there are any."""
    chosen, there = config["num_experts_per_tok"], config["num_experts"]
    if not there:
        return
    if chosen > there:
        raise ValueError(f"config.json: num_experts_per_tok={chosen}: must be at most num_experts={there}")
    if config["norm_topk_prob"] and chosen == 1 < there:
        raise ValueError(
            "config.json: norm_topk_prob=true: must be false with num_experts_per_tok=1: every weight would be 1, "
            "and teach nothing"
        )


def mixture(config: Config, **shared: Any) -> Node:
    """A section of experts, of a config.json."""
    return node(
        MoE,
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        hidden=config["moe_intermediate_size"],
        renormalise=config["norm_topk_prob"],
        **shared,
    )


def ffn_keys(model: Node, who: str, **fixed: Any) -> Config:
    """The keys of a config.json for all feed-forwards, experts or not. Raises ValueError. fixed: keys of the
    experts."""
    dense, mapping, wide = [], [], []
    for i, (name, section) in enumerate(layers(model)):
        path, ffn = f"model.blocks.{name}.ffn", section["ffn"]
        if ffn is not None and ffn["_target_"] == DENSE:
            dense.append(i)
            wide.append((f"{path}.hidden", hidden(path, ffn, who)))
            continue
        if ffn is None or ffn["_target_"] != MIXTURE:
            kind = "null" if ffn is None else ffn["_target_"].rpartition(".")[2]
            raise ValueError(f"{path}={kind}: must be SwiGLU or MoE for {who}")
        moe = with_defaults(ffn, MoE)
        must(path, moe, PLAIN_MIXTURE | fixed, who)
        named = {"num_experts": "num_experts", "num_experts_per_tok": "top_k", "moe_intermediate_size": "hidden"}
        keys = {theirs: moe[key] for theirs, key in named.items()} | {"norm_topk_prob": moe["renormalise"]}
        mapping.append((path, keys | ({"shared_expert_intermediate_size": moe["shared_hidden"]} if fixed else {})))
    keys = one(mapping, who) or {"num_experts": 0}  # all dense: then nothing else says anything
    width = one(wide, who) or keys["moe_intermediate_size"]
    return keys | {"intermediate_size": width, "mlp_only_layers": dense, "decoder_sparse_step": 1}


def only_experts(model: Node, who: str, **fixed: Any) -> Config:
    """The keys of a config.json for experts in every layer. Raises ValueError for other feed-forwards."""
    keys = ffn_keys(model, who, **fixed)
    if keys["mlp_only_layers"]:
        raise ValueError(f"model.blocks: must have MoE in every layer for {who}")
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    return {name: keys[name] for name in names}


def unstacked(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Experts that lie stacked, as current versions of `transformers` hold them, expert by expert: gate_up_proj
    [E, 2I, D] and down_proj [E, D, I]."""
    tensors = {}
    for name, each in stored.items():
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".experts") or last not in ("gate_up_proj", "down_proj") or len(each.shape) != 3:
            tensors[name] = each
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        number, rows = each.shape[0], each.shape[1] // len(parts)
        if each.shape[1] % len(parts):
            raise ValueError(
                f"{each.file.name}: {name} {list(each.shape)}: must have as many rows for gates as for values"
            )
        for i in range(number * len(parts)):
            expert, part = divmod(i, len(parts))
            tensors[f"{stem}.{expert}.{parts[part]}.weight"] = rows_of(each, i * rows, rows)
    return tensors


def stacked(tensors: PublishedTensors, names: Mapping[str, str]) -> PublishedTensors:
    """The same with the experts of each layer in two tensors, [E, 2I, D] and [E, D, I]. names: what is written in
    the place of experts.gate_up_proj and experts.down_proj, and of other endings of names."""
    result: PublishedTensors = {}
    numbers: dict[str, int] = {}
    for source, (shape, places) in tensors.items():
        stem, _, rest = source.partition(".experts.")
        number, _, part = rest.partition(".")
        if number.isdigit():
            kind = "experts.down_proj" if part == "down_proj.weight" else "experts.gate_up_proj"
            name = f"{stem}.{names[kind]}"
            numbers[name] = int(number) + 1
            so_far, before = result.get(name, ((0,), ()))
            result[name] = (so_far[0] + shape[0], *shape[1:]), (*before, *places)
        else:
            own = next((end for end in names if source.endswith(f".{end}")), None)
            result[source if own is None else source.removesuffix(own) + names[own]] = (shape, places)
    for name, number_of_experts in numbers.items():
        (rows, *columns), places = result[name]
        result[name] = (number_of_experts, rows // number_of_experts, *columns), places
    return result


def dense_rows(ours: str, theirs: str, hidden: int, dim: int) -> Entries:
    gate, up, down = (f"{theirs}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return {f"{ours}.gate_up.weight": joined((gate, hidden), (up, hidden)), f"{ours}.down.weight": whole(down, dim)}


def mixture_rows(ours: str, theirs: str, config: Config) -> Entries:
    E, hidden, dim = config["num_experts"], config["moe_intermediate_size"], config["hidden_size"]
    names = [f"{theirs}.experts.{e}" for e in range(E)]
    gate_up = [(f"{name}.{part}_proj.weight", hidden) for name in names for part in ("gate", "up")]
    down = [(f"{name}.down_proj.weight", dim) for name in names]
    return {
        f"{ours}.router.weight": whole(f"{theirs}.gate.weight", E),
        f"{ours}.experts.gate_up": joined(*gate_up, form=experts(2 * hidden)),
        f"{ours}.experts.down": joined(*down, form=experts(dim)),
    }


def shared_rows(ours: str, theirs: str, config: Config) -> Entries:
    """The shared expert and its gate."""
    hidden, dim = config["shared_expert_intermediate_size"], config["hidden_size"]
    return {
        **dense_rows(f"{ours}.shared", f"{theirs}.shared_expert", hidden, dim),
        f"{ours}.shared_gate.weight": whole(f"{theirs}.shared_expert_gate.weight", 1),
    }


def ends(config: Config, *, body: str = "model", embed: str = "embed_tokens", norm: Form = PLAIN, last: str = "norm"):
    """Embedding, last norm and head."""
    V, D = config["vocab_size"], config["hidden_size"]
    rows = {
        "embedding": whole(f"{body}.{embed}.weight", V),
        "norm.weight": whole(f"{body}.{last}.weight", D, norm),
    }
    if not config["tie_word_embeddings"]:
        rows["head.weight"] = whole("lm_head.weight", V)
    return rows


def norms(layer: int, dim: int, form: Form = PLAIN) -> Entries:
    """The two norms of a layer."""
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
    return {
        f"{ours}.mixer_norm.weight": whole(f"{theirs}.input_layernorm.weight", dim, form),
        f"{ours}.ffn_norm.weight": whole(f"{theirs}.post_attention_layernorm.weight", dim, form),
    }
