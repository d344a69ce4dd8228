"""Transformers of attention and SwiGLU that differ from Llama in few things: Qwen3 (2505.09388), Mistral (2310.06825),
SmolLM3, Phi-3 (2404.14219) and ERNIE-4.5.

Legend: H heads, G heads of keys and values, K head width.
"""

from collections.abc import Callable, Mapping
from typing import Any

from models.ffn import SwiGLU
from models.hub import layers as parts
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
from models.hub.rows import PLAIN, Entries, ParameterSource, PublishedRows, joined, whole
from models.hub.values import FLAG, WORDS, Kind, listed, optional, shown
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


def windows(config: Config, usual: Callable[[int], bool]) -> list[bool]:
    """Says of each layer whether its attention has the window. usual: for a configuration without `layer_types`.

    Raises ValueError for types that are none, and for a window that the reader leaves out."""
    number, types = config["num_hidden_layers"], config["layer_types"]
    there = config["use_sliding_window"] and config["sliding_window"] is not None
    if types is None:
        return [there and usual(i) for i in range(number)]
    if len(types) != number or set(types) - {FULL, WINDOWED}:
        raise ValueError(f"config.json: layer_types={shown(types)}: must be {number} of {FULL}, {WINDOWED}")
    if WINDOWED in types and not there:
        raise ValueError(f"config.json: layer_types={shown(types)}: must be {FULL} without a sliding_window")
    return [each == WINDOWED for each in types]


def changed(model: Node, change: Callable[[Node], Node]) -> Node:
    """The `model` section with keys of its layers' mixers changed. change: a mixer with every key to those keys."""
    blocks = dict(model["blocks"])
    for name, section in blocks.items():
        if section["mixer"]["_target_"] == parts.ATTENTION:
            mixer = with_defaults(section["mixer"], Attention)
            blocks[name] = {**section, "mixer": {**mixer, **change(mixer)}}
    return {**model, "blocks": blocks}


def rotates(mixer: Node) -> bool:
    """Says whether an attention has positions; a section that names none has rotary ones."""
    positions = mixer["positions"]
    return not (isinstance(positions, dict) and positions["_target_"] == ROPELESS)


def only_dense(model: Node, who: str) -> Config:
    """`intermediate_size` of layers that all have SwiGLU. Raises ValueError for others."""
    keys = []
    for name, section in layers(model):
        ffn, path = section["ffn"], f"model.blocks.{name}.ffn"
        if ffn is None or ffn["_target_"] != parts.DENSE:
            kind = "null" if ffn is None else ffn["_target_"].rpartition(".")[2]
            raise ValueError(f"{path}={kind}: must be SwiGLU for {who}")
        keys.append((f"{path}.hidden", ffn["hidden"]))
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


def _body(config: Config, mixers: list[tuple[str, Node]]) -> Node:
    """The `model` section of layers with these attentions, each with a name of its own for its kind."""
    eps, ffn = config["rms_norm_eps"], node(SwiGLU, hidden=config["intermediate_size"])
    blocks = {name: parts.block(mixer, ffn, eps) for name, mixer in mixers}
    return parts.stack(config, [name for name, _ in mixers], blocks, eps)


def _alike(config: Config, mixer: Node) -> Node:
    return _body(config, [("attn", mixer)] * config["num_hidden_layers"])


def _express(model: Node, who: str, *, partial: bool = False, norm: bool = False, **fixed: Any) -> Config:
    keys = parts.attention_keys(model, who, partial=partial, qk_norm=norm, gate=False, **fixed)
    mixers: Mapping[str, type] = {parts.ATTENTION: Attention} if norm else {}
    eps = {"rms_norm_eps": parts.eps_of(model, who, mixers)}
    return parts.shapes(model, who) | eps | keys | only_dense(model, who)


def _entries(attention: Callable[[str, str, Config], Entries], *, fused: bool = False) -> Callable[[Config], Entries]:
    """attention: the rows of a layer's. fused: whether gates and values of SwiGLU lie in one tensor."""

    def rows(config: Config) -> Entries:
        rows, D, hidden = parts.ends(config), config["hidden_size"], config["intermediate_size"]
        for i in range(config["num_hidden_layers"]):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            rows |= parts.norms(i, D)
            rows |= attention(f"{ours}.mixer", f"{theirs}.self_attn", config)
            if fused:
                rows[f"{ours}.ffn.gate_up.weight"] = whole(f"{theirs}.mlp.gate_up_proj.weight", 2 * hidden)
                rows[f"{ours}.ffn.down.weight"] = whole(f"{theirs}.mlp.down_proj.weight", D)
            else:
                rows |= parts.dense_rows(f"{ours}.ffn", f"{theirs}.mlp", hidden, D)
        return rows

    return rows


def _suits(model: Node, mixers: set[str]) -> bool:
    """Accepts attention alone; what else it may not have is told where it is expressed."""
    return mixers == {parts.ATTENTION}


def _architecture(name: str, kind: str, **values: Any) -> Architecture:
    common: dict[str, Any] = {"mixers": frozenset({parts.ATTENTION}), "suits": _suits, "fits": parts.heads_fit}
    return Architecture(name=name, kind=kind, **(common | values))


# --- Mistral: one window for all layers, or none

MISTRAL = _architecture(
    "MistralForCausalLM",
    "mistral",
    about="as Llama, with a window for all layers or none",
    defaults=USUAL | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    fixed={"hidden_act": "silu"},
    kinds=parts.HEADS | {"sliding_window": optional(count())},
    body=lambda config: _alike(config, parts.attention(config, window=config["sliding_window"])),
    express=lambda model: _express(model, "MistralForCausalLM"),
    entries=_entries(parts.attention_rows),
)


# --- Qwen3: normalised queries and keys, a window in the last layers


def _qwen3_body(config: Config) -> Node:
    plain = parts.attention(config, qk_norm=True, norm_eps=config["rms_norm_eps"])
    windowed = {**plain, "window": config["sliding_window"]}
    windows_by_layer = windows(config, lambda i: i >= config["max_window_layers"])
    return _body(config, [("window", windowed) if each else ("attn", plain) for each in windows_by_layer])


def _qwen3_express(model: Node) -> Config:
    name = "Qwen3ForCausalLM"
    keys = _express(changed(model, lambda mixer: {"window": None}), name, norm=True)
    return keys | window_keys(model, name)


QWEN3 = _architecture(
    "Qwen3ForCausalLM",
    "qwen3",
    about="attention with `qk_norm`, a window in some layers or none, and SwiGLU",
    defaults={
        **USUAL,
        **{"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
        **{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None},
    },
    fixed={"hidden_act": "silu", "attention_bias": False},
    kinds=parts.HEADS | WINDOWS | {"max_window_layers": count(0), "layer_types": optional(WORDS)},
    body=_qwen3_body,
    express=_qwen3_express,
    entries=_entries(lambda ours, theirs, config: parts.attention_rows(ours, theirs, config, norm=PLAIN)),
)


# --- SmolLM3: no positions in every fourth layer


def _ropes(config: Config) -> list[bool]:
    """Says of each layer whether it rotates. Raises ValueError for fewer flags than layers."""
    number, flags = config["num_hidden_layers"], config["no_rope_layers"]
    if flags is None:
        return [(i + 1) % config["no_rope_layer_interval"] != 0 for i in range(number)]
    if len(flags) < number or set(flags) - {0, 1}:
        raise ValueError(f"config.json: no_rope_layers={shown(flags)}: must be {number} of 0, 1")
    return [bool(flag) for flag in flags[:number]]


def _smollm3_body(config: Config) -> Node:
    plain, ropes = parts.attention(config), _ropes(config)
    keys = []
    for rope, window in zip(ropes, windows(config, lambda i: not ropes[i]), strict=True):
        positions = plain["positions"] if rope else node(NoPE, partial=False)
        mixer = {**plain, "positions": positions, "window": config["sliding_window"] if window else None}
        keys.append((("attn" if rope else "nope") + ("_window" if window else ""), mixer))
    return _body(config, keys)


def _smollm3_express(model: Node) -> Config:
    """Layers without positions are told by their flags, and then say what the others do."""
    name = "SmolLM3ForCausalLM"
    mixers = [with_defaults(section["mixer"], Attention) for _, section in layers(model)]
    rotary = next((mixer["positions"] for mixer in mixers if rotates(mixer)), None)

    def change(mixer: Node) -> Node:
        return {"window": None, "positions": mixer["positions"] if rotates(mixer) else rotary}

    keys = _express(changed(model, change), name) | window_keys(model, name)
    return keys | {"no_rope_layers": [int(rotates(mixer)) for mixer in mixers], "pad_token_id": None}


SMOLLM3 = _architecture(
    "SmolLM3ForCausalLM",
    "smollm3",
    about="as Llama, layers without positions, and a window in some or none",
    defaults={
        **USUAL,
        **{"num_key_value_heads": 4, "max_position_embeddings": 32_768, "tie_word_embeddings": True},
        **{"use_sliding_window": False, "sliding_window": None, "layer_types": None},
        **{"no_rope_layers": None, "no_rope_layer_interval": 4, "rope_theta": 2_000_000.0},
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    kinds={
        **parts.HEADS,
        **WINDOWS,
        "layer_types": optional(WORDS),
        "no_rope_layers": optional(listed(count(0), "0 and 1")),
        "no_rope_layer_interval": count(),
    },
    body=_smollm3_body,
    express=_smollm3_express,
    entries=_entries(parts.attention_rows),
)


# --- Phi-3: queries, keys and values in one tensor, gates and values in another


def _phi3_rows(ours: str, theirs: str, config: Config) -> Entries:
    H = config["num_attention_heads"]
    G = config["num_key_value_heads"] or H
    K = config["head_dim"] or config["hidden_size"] // H
    source = f"{theirs}.qkv_proj.weight"
    kv = tuple(PublishedRows(source, (H + part * G + g) * K, K) for g in range(G) for part in (0, 1))
    return {
        f"{ours}.q.weight": ParameterSource((PublishedRows(source, 0, H * K),)),
        f"{ours}.kv.weight": ParameterSource(kv),
        f"{ours}.out.weight": whole(f"{theirs}.o_proj.weight", config["hidden_size"]),
    }


def _phi3_fits(config: Config) -> None:
    """Its reader knows no other rules than its own two, and takes YaRN for one of them."""
    parts.heads_fit(config)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: rope_type={shown(kind)}: must be default for Phi3ForCausalLM")


PHI3 = _architecture(
    "Phi3ForCausalLM",
    "phi3",
    about="as Mistral, a share of each head rotated; plain rotary positions only",
    defaults=USUAL | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None},
    fixed={"hidden_act": "silu"},
    kinds=parts.HEADS | {"sliding_window": optional(count())},
    fits=_phi3_fits,
    body=lambda config: _alike(config, parts.attention(config, fraction=1.0, window=config["sliding_window"])),
    express=lambda model: _express(model, "Phi3ForCausalLM", partial=True) | {"pad_token_id": None},
    entries=_entries(_phi3_rows, fused=True),
)


# --- ERNIE-4.5: pairs of rotated channels lie side by side


def _ernie_rows(ours: str, theirs: str, config: Config) -> Entries:
    """Rotated pairs are channels 2i and 2i + 1 of a head there, i and K/2 + i here."""
    H = config["num_attention_heads"]
    G = config["num_key_value_heads"] or H
    K = config["head_dim"] or config["hidden_size"] // H
    order = (*range(0, K, 2), *range(1, K, 2))

    def head(part: str, h: int) -> list[PublishedRows]:
        return [PublishedRows(f"{theirs}.{part}_proj.weight", h * K + row, 1) for row in order]

    kv = [each for g in range(G) for each in (*head("k", g), PublishedRows(f"{theirs}.v_proj.weight", g * K, K))]
    return {
        f"{ours}.q.weight": ParameterSource(tuple(each for h in range(H) for each in head("q", h))),
        f"{ours}.kv.weight": ParameterSource(tuple(kv)),
        f"{ours}.out.weight": joined((f"{theirs}.o_proj.weight", config["hidden_size"])),
    }


def _ernie_fits(config: Config) -> None:
    """Its tables name every row of the queries."""
    parts.heads_fit(config)
    heads, width = config["num_attention_heads"], config["head_dim"]
    if width is not None and heads * width > LARGE:
        raise ValueError(f"config.json: head_dim={width}: must be at most {LARGE // heads} for {heads} heads")


def _ernie_express(model: Node) -> Config:
    keys = _express(model, "Ernie4_5ForCausalLM", window=None)
    del keys["sliding_window"]
    return keys


ERNIE = _architecture(
    "Ernie4_5ForCausalLM",
    "ernie4_5",
    about="the dense ones: as Llama, rotated channels in another order",
    defaults={
        **USUAL,
        **{"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 131_072, "tie_word_embeddings": True, "rope_theta": 500_000.0},
    },
    fixed={"hidden_act": "silu", "use_bias": False},
    kinds=parts.HEADS,
    fits=_ernie_fits,
    body=lambda config: _alike(config, parts.attention(config)),
    express=_ernie_express,
    entries=_entries(_ernie_rows),
)
