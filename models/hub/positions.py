"""Rules of rotary positions: `rope_parameters` of a config.json (before version 5: `rope_theta` and `rope_scaling`) and
a section of ours, by one table."""

import math
import re
from typing import Any

from models.hub.architecture import Config, Node, node, target
from models.hub.values import ABOVE_ZERO, FLAG, NUMBER, WORD, Kind, check, optional, shown, whole
from models.positions import Interpolated, Llama3, RoPE, YaRN

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
            "truncate": "truncate",
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
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("rope_type", "type"), WORD),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor"), ABOVE_ZERO),
    **dict.fromkeys(("factor", "attention_factor", "beta_fast", "beta_slow"), optional(ABOVE_ZERO)),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), ABOVE_ZERO),
    **dict.fromkeys(("mscale", "mscale_all_dim"), optional(NUMBER)),
    "original_max_position_embeddings": optional(whole()),
    "truncate": FLAG,
}


def read(config: Config, head_dim: int, fraction: float | None = None) -> Node:
    """The positions of a config.json, as its reader understands them. Raises ValueError.

    fraction: of a head that is rotated where the configuration does not say it; null for a class that always rotates
    all of it, whatever the configuration says.
    """
    rope: dict[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    check(rope, KINDS, "config.json: rope_parameters.")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(f"config.json: rope_parameters.{nested[0]}: must be no table: all layers have one rule here")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in RULES:
        raise ValueError(f"config.json: rope_type={shown(kind)}: must be one of {', '.join(RULES)}")
    rule, keys = RULES[kind]
    given = {ours: rope[theirs] for ours, theirs in keys.items() if rope.get(theirs) is not None}
    if "trained_length" in keys:  # beside the rule it counts before the one in it
        own = given.get("trained_length") or config.get("max_position_embeddings")
        given["trained_length"] = config.get("original_max_position_embeddings") or own
    if "factor" in keys and "factor" not in given:
        given["factor"] = (config.get("max_position_embeddings") or math.nan) / given.get("trained_length", math.nan)
    if kind == "yarn" and "attention_factor" not in given and rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = (sharpness(given["factor"], rope[key]) for key in ("mscale", "mscale_all_dim"))
        given["attention_factor"] = next(scales) / next(scales)
    base = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or fraction or 1.0
    if fraction is None and share != 1:
        raise ValueError(
            f"config.json: partial_rotary_factor={share}: must be 1: this architecture rotates whole heads"
        )
    rule_node = node(rule, partial=False, base=float(base), fraction=float(share), **given)
    try:
        rule(**{key: value for key, value in rule_node.items() if not key.startswith("_")}).frequencies(head_dim)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"config.json: {_theirs(str(error), keys)}") from None
    return rule_node


def sharpness(factor: float, mscale: float) -> float:
    """YaRN's attention factor (2309.00071), with DeepSeek's multiple of its logarithm."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _theirs(message: str, keys: dict[str, str]) -> str:
    """A message of a rule, with the published names of its keys."""
    names = keys | {"base": "rope_theta", "fraction": "partial_rotary_factor"}
    return re.sub(r"\b(\w+)(?==)", lambda found: names.get(found[1], found[1]), message)


def write(path: str, positions: Node | None, who: str, *, partial: bool) -> Config:
    """`rope_parameters` of a section of positions. partial: whether `who` can rotate a part of a head. Raises
    ValueError for a rule that has none."""
    positions = node(RoPE, partial=False) if positions is None else positions
    for kind, (rule, keys) in RULES.items():
        if positions["_target_"] == target(rule):
            full = node(rule, partial=False) | positions
            scaled = {theirs: full[ours] for ours, theirs in keys.items() if full[ours] is not None}
            rope = {"rope_type": kind, "rope_theta": full["base"], **scaled}
            if not partial and full["fraction"] != 1:
                raise ValueError(f"{path}.positions.fraction={full['fraction']}: must be 1: {who} rotates whole heads")
            return rope | ({"partial_rotary_factor": full["fraction"]} if partial else {})  # else some read a quarter
    known = ", ".join(rule.__name__ for rule, _ in RULES.values())
    name = positions["_target_"].rpartition(".")[2]
    raise ValueError(f"{path}.positions={name}: must be one of {known} for {who}")
