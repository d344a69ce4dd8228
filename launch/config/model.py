"""The model that a configuration describes, without its weights."""

from typing import Any

from launch.config.validate import checked_model


def model_of(node: dict[str, Any]) -> Any:
    """The model on the meta device. Raises ValueError for one that does not build, UserError for keys and values that
    its constructors do not know."""
    import torch

    from train.instantiate import construct

    with torch.device("meta"):
        try:
            return construct(checked_model(node))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(f"model: cannot be built: {error}") from None
