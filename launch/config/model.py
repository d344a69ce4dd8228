"""The model that a configuration describes, without its weights."""

from collections.abc import Mapping
from typing import Any

from launch.config.validate import checked_model


def model_of(values: Mapping[str, Any]) -> Any:
    """The model on the meta device. Raises ValueError for one that does not build, UserError for keys and values that
    its constructors do not know."""
    import torch

    from train.run_config import ObjectConfig

    with torch.device("meta"):
        try:
            return ObjectConfig(checked_model(values)).build()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(f"model: cannot be built: {error}") from None
