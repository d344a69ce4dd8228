"""A record as what people chart: numbers by flat names, and histograms. The same for every sink."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

MAX_BINS = 512  # as many as W&B takes

Histogram = tuple[list[float], list[float]]  # what each bin holds [n], and the bins' edges [n + 1]


def scalars(record: dict[str, Any]) -> dict[str, Any]:
    """The record's numbers and strings, nested names joined by "/", what was not finite as NaN.

    The loads of a layer's experts become their largest and smallest, times the number of experts (1.0 is balanced), and
    their standard deviation over their mean, `cv` (0.0 is balanced); other lists stay in metrics.jsonl only.
    """
    return dict(_flat(record, ""))


def _flat(record: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}/")
        elif not isinstance(value, list | tuple):
            yield name, math.nan if value is None else value
        elif value and name.startswith("expert_load/"):
            known = [math.nan] if None in value else value
            yield f"{name}/max", max(known) * len(value)
            yield f"{name}/min", min(known) * len(value)
            yield f"{name}/cv", math.sqrt(sum((share * len(value) - 1) ** 2 for share in known) / len(value))


def histograms(record: dict[str, Any]) -> dict[str, Histogram]:
    """Returns where each layer's router sent the tokens, a bin an expert; and, where it is known, how long documents
    were."""
    panels = {
        f"expert_load/{layer}/experts": _by_expert(load)
        for layer, load in record.get("expert_load", {}).items()
        if load and None not in load
    }
    if documents := record.get("documents"):
        limits, counts = zip(*documents, strict=True)
        panels["documents"] = list(counts), [limits[0] / 2, *limits]
    return panels


def _by_expert(load: list[float]) -> Histogram:
    """Neighbours share a bin where there are more experts than bins."""
    width = -(-len(load) // MAX_BINS)
    firsts = range(0, len(load), width)
    return [sum(load[first : first + width]) for first in firsts], [*map(float, firsts), float(len(load))]
