"""Parts that several architectures share: their sections, and the rows of their tensors.

Legend: H heads, G heads of keys and values, K head width, E experts.
"""

from typing import Any

from models.block import Block
from models.ffn import SwiGLU
from models.hub import positions
from models.hub.architecture import Config, Node, fold, layers, must, node, one, target, told
from models.hub.rows import PLAIN, Entries, Entry, Form, Rows, experts, joined, whole
from models.lm import LM
from models.mixers.attention import Attention
from models.moe import MoE

ATTENTION, DENSE, MIXTURE = target(Attention), target(SwiGLU), target(MoE)


def stack(config: Config, kinds: list[str], blocks: dict[str, Node], eps: float) -> Node:
    """The `model` section of these layers, kind by kind."""
    tied = bool(config["tie_word_embeddings"])
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


def block(mixer: Node, ffn: Node | None, eps: float) -> Node:
    return node(Block, mixer=mixer, ffn=ffn, norm_eps=eps)


def shapes(model: Node, who: str) -> Config:
    """What a config.json says of the model as a whole. Raises ValueError."""
    return {
        "vocab_size": model["vocabulary"],
        "hidden_size": model["dim"],
        "num_hidden_layers": model["layers"],
        "tie_word_embeddings": bool(model.get("tied")),
    }


def eps_of(model: Node, who: str) -> float:
    """What all norms of the residual stream add to the mean square. Raises ValueError where they differ."""
    blocks = ((f"model.blocks.{name}.norm_eps", b.get("norm_eps", 1e-5)) for name, b in layers(model))
    return one([*blocks, ("model.norm_eps", model.get("norm_eps", 1e-5))], who)


# --- softmax attention


def attention(config: Config, *, fraction: float = 1.0, **fixed: Any) -> Node:
    """A section of attention, of a config.json."""
    heads = config["num_attention_heads"]
    return node(
        Attention,
        heads=heads,
        kv_heads=config["num_key_value_heads"] or heads,
        head_dim=config["head_dim"] or config["hidden_size"] // heads,
        positions=positions.read(config, fraction),
        **fixed,
    )


def attention_keys(model: Node, who: str, **fixed: Any) -> Config:
    """What a config.json says of all attention layers. Raises ValueError where they differ, or for another `fixed`."""
    found = []
    for name, section in layers(model):
        if section["mixer"]["_target_"] != ATTENTION:
            continue
        path, mixer = f"model.blocks.{name}.mixer", told(section["mixer"], Attention)
        must(path, mixer, {"sinks": 0, **fixed}, who)
        heads, rope = mixer["heads"], mixer["positions"] if isinstance(mixer["positions"], dict) else None
        keys = {
            "num_attention_heads": heads,
            "num_key_value_heads": mixer["kv_heads"] or heads,
            "head_dim": mixer["head_dim"] or model["dim"] // heads,
            "sliding_window": mixer["window"],
            "rope_parameters": positions.write(path, rope, who),
        }
        found.append((path, keys))
    return one(found, who) or {}


def attention_rows(ours: str, theirs: str, config: Config, *, gate: bool = False, norm: Form | None = None) -> Entries:
    """A layer's attention. gate: whether the queries' rows lie head by head beside the gate's."""
    H = config["num_attention_heads"]
    G, D = config["num_key_value_heads"] or H, config["hidden_size"]
    K = config["head_dim"] or D // H
    q, k, v, o = (f"{theirs}.{name}_proj.weight" for name in "qkvo")
    rows = {
        f"{ours}.kv.weight": Entry(tuple(Rows(x, g * K, K) for g in range(G) for x in (k, v))),
        f"{ours}.out.weight": whole(o, D),
    }
    if gate:
        rows[f"{ours}.q.weight"] = Entry(tuple(Rows(q, 2 * h * K, K) for h in range(H)))
        rows[f"{ours}.gate.weight"] = Entry(tuple(Rows(q, (2 * h + 1) * K, K) for h in range(H)))
    else:
        rows[f"{ours}.q.weight"] = whole(q, H * K)
    if norm is not None:
        rows |= {f"{ours}.{x}_norm.weight": whole(f"{theirs}.{x}_norm.weight", K, norm) for x in "qk"}
    return rows


# --- feed-forwards


def sparse(config: Config) -> list[bool]:
    """Which layers have experts, of `decoder_sparse_step` and `mlp_only_layers`."""
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"] or []
    layers = range(config["num_hidden_layers"])
    return [config["num_experts"] > 0 and i not in dense and (i + 1) % step == 0 for i in layers]


def mixture(config: Config, **shared: Any) -> Node:
    """A section of experts, of a config.json."""
    return node(
        MoE,
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        hidden=config["moe_intermediate_size"],
        renormalise=bool(config["norm_topk_prob"]),
        **shared,
    )


def ffn_keys(model: Node, who: str, **fixed: Any) -> Config:
    """What a config.json says of all feed-forwards, experts or not. Raises ValueError. fixed: keys of the experts."""
    dense, found, wide = [], [], []
    for i, (name, section) in enumerate(layers(model)):
        path, ffn = f"model.blocks.{name}.ffn", section["ffn"]
        if ffn is not None and ffn["_target_"] == DENSE:
            dense.append(i)
            wide.append((f"{path}.hidden", ffn["hidden"]))
            continue
        if ffn is None or ffn["_target_"] != MIXTURE:
            kind = "null" if ffn is None else ffn["_target_"].rpartition(".")[2]
            raise ValueError(f"{path}={kind}: must be SwiGLU or MoE for {who}")
        moe = told(ffn, MoE)
        must(path, moe, {"router": "softmax", "scale": 1.0, "bias_rate": 0.0, "capacity_factor": None, **fixed}, who)
        named = {"num_experts": "num_experts", "num_experts_per_tok": "top_k", "moe_intermediate_size": "hidden"}
        keys = {theirs: moe[key] for theirs, key in named.items()} | {"norm_topk_prob": moe["renormalise"]}
        found.append((path, keys | ({"shared_expert_intermediate_size": moe["shared_hidden"]} if fixed else {})))
    keys = one(found, who)
    if keys is None:
        raise ValueError(f"model.pattern=[{','.join(model['pattern'])}]: must have a layer with experts for {who}")
    hidden = one(wide, who) or keys["moe_intermediate_size"]
    return keys | {"intermediate_size": hidden, "mlp_only_layers": dense, "decoder_sparse_step": 1}


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
