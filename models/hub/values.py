"""The values that a key of a config.json may have. JSON has one kind of number, and a folder may come from anywhere:
`"64"`, `4.0` and `true` are no whole numbers here, as they are none for `transformers`."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

SHOWN = 80  # characters of a value in a message


class Kind(NamedTuple):
    """words: what a value must be. holds: whether one is."""

    words: str
    holds: Callable[[Any], bool]


def whole(least: int = 1) -> Kind:
    return Kind(f"a whole number of at least {least}", lambda v: type(v) is int and least <= v < 1 << 53)


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda v: v is None or kind.holds(v))


def listed(kind: Kind, plural: str) -> Kind:
    return Kind(f"a list of {plural}", lambda v: isinstance(v, list) and all(kind.holds(each) for each in v))


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


NUMBER = Kind("a number", _number)
ABOVE_ZERO = Kind("a number above 0", lambda v: _number(v) and v > 0)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
WORD = Kind("a word", lambda v: isinstance(v, str))
TABLE = Kind("a table", lambda v: isinstance(v, dict))
WORDS = listed(WORD, "words")

COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
USUAL: dict[str, Kind] = {  # keys that mean the same wherever there are any
    **dict.fromkeys(COUNTS, whole()),
    "intermediate_size": whole(),
    "rms_norm_eps": ABOVE_ZERO,
    "max_position_embeddings": whole(),
    "original_max_position_embeddings": optional(whole()),
    "tie_word_embeddings": FLAG,
    "rope_theta": optional(ABOVE_ZERO),
    "partial_rotary_factor": ABOVE_ZERO,
    "rope_scaling": optional(TABLE),
    "rope_parameters": optional(TABLE),
    "architectures": WORDS,
}


def check(values: Mapping[str, Any], kinds: Mapping[str, Kind], place: str = "config.json: ") -> None:
    """Raises ValueError for the first key whose value is of another kind."""
    for key, kind in kinds.items():
        if key in values and not kind.holds(values[key]):
            raise ValueError(f"{place}{key}={shown(values[key])}: must be {kind.words}")


def shown(value: Any) -> str:
    """A value as it is written in YAML and JSON, cut where it is long."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if type(value) is int and abs(value) >= 10**40:  # Python refuses to write the longest
        return "a number of more than 40 digits"
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
