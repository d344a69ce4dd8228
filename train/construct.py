"""From YAML to objects: `_target_` nodes, of this project and torch.optim only."""

from typing import Any

ROOMS = ("data.", "models.", "parallel.", "train.", "launch.templates.", "torch.optim.")


def allowed(target: str) -> bool:
    """Whether a configuration may name `target`: it may build our objects, and call nothing else."""
    return target.startswith(ROOMS)


def construct(node: Any) -> Any:
    """The object of a `_target_` node, its children built first.

    Raises ValueError for a target outside the project, and what a constructor raises for a value that it refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    for target in _targets(node):
        if not allowed(target):
            raise ValueError(f"_target_={target}: must be a class of {', '.join(ROOMS)}")
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ or error from None


def _targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [t for child in node.values() for t in _targets(child)]
    return [t for child in node for t in _targets(child)] if isinstance(node, list) else []
