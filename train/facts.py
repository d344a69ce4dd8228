"""The types of a checkpoint's manifest: one from elsewhere may say anything."""

import math
from collections.abc import Callable
from typing import Any

DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
_COUNTS = ("step", "tokens", "skips", "attempt", "rollbacks", "since")


def wrong(facts: dict[str, Any]) -> str | None:
    """The first key of a manifest with a value of a type that none has; None where all are sound."""
    if not _is_count(facts.get("step")):
        return "step"
    for key in _COUNTS:
        if not _is_count(facts.get(key, 0)):
            return key
    sound = {
        "model": _are(
            facts.get("model"), lambda entry: _is_list(entry, 2) and _is_shape(entry[0]) and entry[1] in DTYPES
        ),
        "files": _are(facts.get("files"), lambda entry: _is_list(entry, 2) and all(map(_is_count, entry))),
        "skipped": _are_spans(facts.get("skipped", [])),
        "scale": _is_number(facts.get("scale", 1.0)) and facts.get("scale", 1.0) > 0,
        "rope_theta": facts.get("rope_theta") is None or _is_number(facts["rope_theta"]) and facts["rope_theta"] > 0,
        "seed": facts.get("seed") is None or _is_count(facts["seed"]),
        "data": facts.get("data") is None or isinstance(facts["data"], str),
        "order": facts.get("order") is None or isinstance(facts["order"], dict),
        "before": facts.get("before") is None or _are(facts["before"], _is_loss_before),
        "guard": _is_guard(facts.get("guard") or {}),
        "average": _is_average(facts.get("average") or {}),
    }
    return next((key for key, value in sound.items() if not value), None)


def _are(node: Any, sound: Callable[[Any], bool]) -> bool:
    return isinstance(node, dict) and all(map(sound, node.values()))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_loss_before(value: Any) -> bool:
    """Says whether this is a held-out loss, or that of all windows and that of a part of so many tokens."""
    if not isinstance(value, dict):
        return _is_number(value)
    return _is_number(value.get("whole")) and _is_number(value.get("part")) and _is_count(value.get("tokens"))


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are_spans(value: Any) -> bool:
    return isinstance(value, list) and all(_is_list(each, 2) and all(map(_is_count, each)) for each in value)


def _is_guard(facts: Any) -> bool:
    """Returns what `train.guard` has noted: a window of losses and of norms, null where it is not filled."""
    if not isinstance(facts, dict):
        return False
    if not (rows := facts.get("seen")):
        return True
    if not _is_list(rows, 2) or not all(isinstance(row, list) for row in rows) or len(rows[0]) != len(rows[1]):
        return False
    return _is_count(facts.get("decided")) and all(x is None or _is_number(x) for row in rows for x in row)


def _is_average(facts: Any) -> bool:
    """Returns what `train.average` has noted."""
    if not facts:
        return True
    return (
        isinstance(facts, dict)
        and isinstance(facts.get("kind"), str)
        and all(_is_count(facts.get(key)) for key in ("seen", "taken", "snapshots"))
    )
