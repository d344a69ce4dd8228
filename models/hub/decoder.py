"""Decoders with attention and a feed-forward in every layer: the parts of which the tables of such families are made.

Legend: H heads, G heads of keys and values, K head width, D model width.
"""

from collections.abc import Callable, Mapping
from typing import Any

from models.ffn import SwiGLU
from models.hub import layers as parts
from models.hub import positions
from models.hub.architecture import (
    LARGE,
    REQUIRED,
    Architecture,
    Config,
    Node,
    layers,
    node,
    one,
    target,
    with_defaults,
)
from models.hub.rows import PLAIN, Entries, Form, whole
from models.hub.values import FLAG, Kind, optional, shown
from models.hub.values import whole as count
from models.mixers.attention import Attention
from models.positions import NoPE

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
USUAL: Config = {
    **dict.fromkeys(SIZES, REQUIRED),
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
WINDOWS: dict[str, Kind] = {"use_sliding_window": FLAG, "sliding_window": optional(count())}
ROPELESS = target(NoPE)
FULL, WINDOWED = "full_attention", "sliding_attention"

# Names of a layer's norms, ours and theirs. post: OLMo-2's way. both: Gemma's.
PRE = {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST = {"mixer_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
BOTH = {"mixer_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **POST}

Rows = Callable[[str, str, Config], Entries]  # of our part and of theirs, by the beginnings of their names
LayerRows = Callable[[str, str, Config, int], Entries]  # the same for the layer of this number


def windows(config: Config, usual: Callable[[int], bool]) -> list[bool]:
    """Says of each layer whether its attention has the window. usual: for a configuration without `layer_types`.

    Raises ValueError for types that are none, and for a window that the reader leaves out."""
    number, types = config["num_hidden_layers"], config["layer_types"]
    there = config.get("use_sliding_window", True) and config["sliding_window"] is not None
    if types is None:
        return [bool(there and usual(i)) for i in range(number)]
    if len(types) != number or set(types) - {FULL, WINDOWED}:
        raise ValueError(f"config.json: layer_types={shown(types)}: must be {number} of {FULL}, {WINDOWED}")
    if WINDOWED in types and not there:
        raise ValueError(f"config.json: layer_types={shown(types)}: must be {FULL} without a sliding_window")
    return [each == WINDOWED for each in types]


def changed(model: Node, change: Callable[[Node], Node]) -> Node:
    """The `model` section with keys of its layers' mixers changed. change: a mixer with every key to those keys."""
    blocks = dict(model["blocks"])
    for name, section in blocks.items():
        if section["mixer"] is not None and section["mixer"]["_target_"] == parts.ATTENTION:
            mixer = with_defaults(section["mixer"], Attention)
            blocks[name] = {**section, "mixer": {**mixer, **change(mixer)}}
    return {**model, "blocks": blocks}


def rotates(mixer: Node) -> bool:
    """Says whether an attention has positions; a section that names none has rotary ones."""
    positions = mixer["positions"]
    return not (isinstance(positions, dict) and positions["_target_"] == ROPELESS)


def first(model: Node, key: str) -> Any:
    """A key of the first attention layer."""
    mixers = (section["mixer"] for _, section in layers(model))
    mixer: Node = next((mixer for mixer in mixers if mixer["_target_"] == parts.ATTENTION), {})
    return (node(Attention, heads=1) | mixer)[key]


def only_dense(model: Node, who: str, *, activation: str = "silu") -> Config:
    """`intermediate_size` of layers that all have SwiGLU, or its kind with another activation. Raises ValueError for
    others."""
    keys = []
    for name, section in layers(model):
        ffn, path = section["ffn"], f"model.blocks.{name}.ffn"
        if ffn is None or ffn["_target_"] != parts.DENSE:
            kind = "null" if ffn is None else ffn["_target_"].rpartition(".")[2]
            raise ValueError(f"{path}={kind}: must be SwiGLU for {who}")
        keys.append((f"{path}.hidden", parts.hidden(path, ffn, who, activation=activation)))
    return {"intermediate_size": one(keys, who)}


def window_keys(model: Node, who: str) -> Config:
    """`sliding_window` and `layer_types` of layers of which some have a window. Raises ValueError for two widths."""
    keys = [
        (f"model.blocks.{name}.mixer.window", with_defaults(b["mixer"], Attention)["window"])
        for name, b in layers(model)
    ]
    width = one(((path, value) for path, value in keys if value is not None), who)
    types = [FULL if value is None else WINDOWED for _, value in keys]
    return {"use_sliding_window": width is not None, "sliding_window": width, "layer_types": types}


def by_window(
    config: Config, attention: Callable[..., Node], *, base: float, local_base: float | None = None, **values: Any
) -> dict[bool, tuple[str, Node]]:
    """The name and section of attention with the window and without, by that, each with positions of its own.

    attention: a section of a configuration. base: of the rule of positions where the configuration names none;
    local_base: the same of layers with a window, null for `base`. Raises ValueError."""
    rope = config.get("rope_parameters") or {}
    if rope and set(rope) - {FULL, WINDOWED}:
        raise ValueError(f"config.json: rope_parameters={shown(rope)}: must be tables of {FULL}, {WINDOWED}")
    older = {FULL: config.get("rope_theta") or base, WINDOWED: config.get("rope_local_base_freq") or local_base or base}
    blocks = {}
    for windowed, kind in ((False, FULL), (True, WINDOWED)):
        own = rope.get(kind) or {"rope_type": "default"}
        if not rope and kind == FULL and config.get("rope_scaling"):
            own = config["rope_scaling"]
        own = {"rope_theta": older[kind], **own}
        section = attention(config | {"rope_parameters": own, "rope_scaling": None}, **values)
        blocks[windowed] = ("window" if windowed else "attn", {**section, "window": None})
        if windowed:
            blocks[True][1]["window"] = config["sliding_window"]
    return blocks


def attentions(model: Node) -> list[tuple[str, Node]]:
    """The key and the section, with every default, of each layer of attention."""
    return [
        (f"model.blocks.{name}.mixer", with_defaults(section["mixer"], Attention))
        for name, section in layers(model)
        if section["mixer"]["_target_"] == parts.ATTENTION
    ]


def express_by_window(model: Node, who: str, **values: Any) -> Config:
    """As `express`, of layers with a window and layers without, each kind with a rule of positions of its own."""
    ropes = {}
    for kind, windowed in ((FULL, False), (WINDOWED, True)):
        own = [(f"{path}.positions", m) for path, m in attentions(model) if (m["window"] is not None) == windowed]
        rules = [(path, m["positions"] if isinstance(m["positions"], dict) else None) for path, m in own]
        if rules:
            rule = positions.write(rules[0][0].removesuffix(".positions"), one(rules, who), who, partial=False)
            ropes[kind] = rule
    usual = next(iter(ropes.values()))
    same = changed(model, lambda mixer: {"window": None, "positions": None})
    keys = express(same, who, **values) | window_keys(model, who)
    del keys["use_sliding_window"]
    return keys | {"rope_parameters": {FULL: usual, WINDOWED: usual} | ropes}


def with_window(keys: Config) -> Config:
    """The same for a reader that makes masks of a window even where no layer has one."""
    return keys if keys["sliding_window"] else keys | {"sliding_window": 4096}


def body(
    config: Config, mixers: list[tuple[str, Node]], ffn: Node | None = None, *, norms: str = "pre", **model: Any
) -> Node:
    """The `model` section of layers with these mixers, each with a name of its own for its kind. ffn: SwiGLU unless
    another is given. norms: as in `models.Block`. model: further keys of the section."""
    eps = config["rms_norm_eps"]
    ffn = node(SwiGLU, hidden=config["intermediate_size"]) if ffn is None else ffn
    blocks = {name: parts.block(mixer, ffn, eps, norms) for name, mixer in mixers}
    return parts.stack(config, [name for name, _ in mixers], blocks, eps) | model


def alike(config: Config, mixer: Node, ffn: Node | None = None, **values: Any) -> Node:
    """The same where all layers have one mixer."""
    return body(config, [("attn", mixer)] * config["num_hidden_layers"], ffn, **values)


def express(
    model: Node,
    who: str,
    *,
    partial: bool = False,
    qk_norm: bool = False,
    norms: str = "pre",
    activation: str = "silu",
    embedding_scale: float = 1.0,
    **fixed: Any,
) -> Config:
    """The keys of a config.json for layers that differ in nothing. Raises ValueError for others. fixed: keys of the
    attention."""
    keys = parts.attention_keys(model, who, partial=partial, qk_norm=qk_norm, **{"gate": False} | fixed)
    mixers: Mapping[str, type] = {parts.ATTENTION: Attention} if qk_norm else {}
    eps = {"rms_norm_eps": parts.eps_of(model, who, mixers, norms=norms)}
    hidden = only_dense(model, who, activation=activation)
    return parts.shapes(model, who, embedding_scale=embedding_scale) | eps | keys | hidden


def fused(ours: str, theirs: str, config: Config, layer: int) -> Entries:
    """SwiGLU whose gates and values lie in one tensor."""
    return {
        f"{ours}.gate_up.weight": whole(f"{theirs}.gate_up_proj.weight", 2 * config["intermediate_size"]),
        f"{ours}.down.weight": whole(f"{theirs}.down_proj.weight", config["hidden_size"]),
    }


def dense(ours: str, theirs: str, config: Config, layer: int) -> Entries:
    return parts.dense_rows(ours, theirs, config["intermediate_size"], config["hidden_size"])


def entries(
    attention: Rows, ffn: LayerRows = dense, *, norms: Mapping[str, str] = PRE, form: Form = PLAIN
) -> Callable[[Config], Entries]:
    """The rows of a model of such layers. norms: as `PRE`. form: of all norms of the residual stream."""

    def rows(config: Config) -> Entries:
        rows, D = parts.ends(config, norm=form), config["hidden_size"]
        for i in range(config["num_hidden_layers"]):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            rows |= {f"{ours}.{own}.weight": whole(f"{theirs}.{name}.weight", D, form) for own, name in norms.items()}
            rows |= attention(f"{ours}.mixer", f"{theirs}.self_attn", config)
            rows |= ffn(f"{ours}.ffn", f"{theirs}.mlp", config, i)
        return rows

    return rows


def suits(model: Node, mixers: set[str]) -> bool:
    """Accepts attention alone; what else it may not have is told where it is expressed."""
    return mixers == {parts.ATTENTION}


def by_row_fits(config: Config) -> None:
    """Raises ValueError as `layers.heads_fit`, and for more rows of queries than a table names one by one."""
    parts.heads_fit(config)
    heads, width = config["num_attention_heads"], config["head_dim"]
    if width is not None and heads * width > LARGE:
        raise ValueError(f"config.json: head_dim={width}: must be at most {LARGE // heads} for {heads} heads")


def architecture(name: str, kind: str, **values: Any) -> Architecture:
    """An architecture of attention alone."""
    common: dict[str, Any] = {"mixers": frozenset({parts.ATTENTION}), "suits": suits, "fits": parts.heads_fit}
    return Architecture(name=name, kind=kind, **(common | values))
