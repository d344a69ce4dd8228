"""Rules of rotary positions: `rope_parameters` of a config.json (before version 5: `rope_theta` and `rope_scaling`) and
a section of ours, by one table."""

import math
from typing import Any

from models.hub.architecture import Config, Node, node, shown, target
from models.rope import Interpolated, Llama3, RoPE, YaRN

# By `rope_type`, our rule and its keys under their published names.
RULES: dict[str, tuple[type[RoPE], dict[str, str]]] = {
    "default": (RoPE, {}),
    "linear": (Interpolated, {"factor": "factor"}),
    "yarn": (
        YaRN,
        {
            "factor": "factor",
            "trained_length": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
        },
    ),
    "llama3": (
        Llama3,
        {
            "factor": "factor",
            "trained_length": "original_max_position_embeddings",
            "low": "low_freq_factor",
            "high": "high_freq_factor",
        },
    ),
}
NEUTRAL = {"truncate": (True, None), "mscale": (None, 0), "mscale_all_dim": (None, 0)}  # keys without a part in ours
ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read(config: Config, fraction: float = 1.0) -> Node:
    """The positions of a config.json; `fraction` where it does not say one. Raises ValueError."""
    rope: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in RULES:
        raise ValueError(f"config.json: rope_type={kind}: must be one of {', '.join(RULES)}")
    rule, keys = RULES[kind]
    for key, value in rope.items():
        if key in NEUTRAL and value not in NEUTRAL[key] and kind == "yarn":
            raise ValueError(f"config.json: {key}={shown(value)}: must be {shown(NEUTRAL[key][0])}")
    given = {ours: rope[theirs] for ours, theirs in keys.items() if rope.get(theirs) is not None}
    if "trained_length" in keys and "trained_length" not in given:
        given["trained_length"] = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if "factor" in keys and "factor" not in given:
        given["factor"] = config["max_position_embeddings"] / given.get("trained_length", math.nan)
    base = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or fraction
    found = node(rule, partial=False, base=float(base), fraction=float(share), **given)
    try:
        rule(**{key: value for key, value in found.items() if not key.startswith("_")})
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json: rope_parameters: {error}") from None
    return found


def write(path: str, positions: Node | None, who: str) -> Config:
    """`rope_parameters` of a section of positions. Raises ValueError for a rule that has none."""
    positions = node(RoPE, partial=False) if positions is None else positions
    for kind, (rule, keys) in RULES.items():
        if positions["_target_"] == target(rule):
            full = node(rule, partial=False) | positions
            scaled = {theirs: full[ours] for ours, theirs in keys.items() if full[ours] is not None}
            rope = {"rope_type": kind, "rope_theta": full["base"], **scaled}
            return rope | ({"partial_rotary_factor": full["fraction"]} if full["fraction"] != 1 else {})
    known = ", ".join(rule.__name__ for rule, _ in RULES.values())
    name = positions["_target_"].rpartition(".")[2]
    raise ValueError(f"{path}.positions={name}: must be one of {known} for {who}")
