"""A constructor's refusal as one line that starts with the whole key."""

from contextlib import contextmanager
from typing import Any

from launch.errors import UserError
from train.run_config import RunConfig


@contextmanager
def refusals(config: RunConfig | dict[str, Any]):
    """Turns a constructor's ValueError into a UserError whose line starts with the full key."""
    try:
        yield
    except ValueError as error:
        line = " ".join(str(error).split())
        key, _, rest = line.partition("=")
        value = rest.partition(":")[0]
        candidates = (
            None
            if "." in key
            else next(
                (
                    p
                    for p, v in _leaves(config if isinstance(config, dict) else config.to_dict())
                    if p.endswith(f".{key}") and str(v) == value
                ),
                None,
            )
        )
        raise UserError(f"{candidates}={rest}" if candidates else line) from None


def _leaves(node: Any, path: str = ""):
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
