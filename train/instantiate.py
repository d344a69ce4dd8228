"""Builds objects from YAML: `_target_` nodes, of this project and torch.optim only."""

from functools import partial
from importlib import import_module
from typing import Any

from train.renamed import with_canonical_names

ROOMS = ("data.", "models.", "parallel.", "train.", "launch.templates.", "torch.optim.")


def allowed(target: str) -> bool:
    """Says whether `target` lies in a room whose classes a configuration may build."""
    return target.startswith(ROOMS)


def is_class(target: str) -> bool:
    """Says whether a `_target_` names a class that is defined in those rooms: not what their modules have imported."""
    room, _, name = target.rpartition(".")
    if not allowed(target):
        return False
    try:
        value = getattr(import_module(room), name, None)
    except ImportError:
        return False
    return isinstance(value, type) and allowed(f"{value.__module__}.")


def construct(node: Any) -> Any:
    """The object of a `_target_` node, its children built first.

    Raises ValueError for a target outside the project, and what a constructor raises for a value that it refuses.
    """
    node = with_canonical_names(node)
    for target in _targets(node):
        if not is_class(target):
            raise ValueError(f"_target_={target}: must be a class of {', '.join(ROOMS)}")
    return _built(node)


def _built(node: Any) -> Any:
    """Builds a tree of plain values as Hydra's `instantiate` does, without copying each node into OmegaConf's first:
    that took two fifths of a small run's start."""
    if isinstance(node, list):
        return [_built(child) for child in node]
    if not isinstance(node, dict):
        return node
    children = {key: _built(child) for key, child in node.items() if key not in ("_target_", "_partial_")}
    if "_target_" not in node:
        return children
    room, _, name = node["_target_"].rpartition(".")
    made = getattr(import_module(room), name)
    return partial(made, **children) if node.get("_partial_") else made(**children)


def _targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [t for child in node.values() for t in _targets(child)]
    return [t for child in node for t in _targets(child)] if isinstance(node, list) else []
