"""Refusals of a mesh that the model, or what else the run is built from, cannot be divided by."""

from typing import Any

from parallel.schedule.mesh import Mesh
from train.run_config import RunConfig


def check_layout(config: RunConfig, mesh: Mesh, model: Any) -> None:
    """Raises ValueError that names the size and what stands in its way. model: on the meta device."""
    from models.axes import declarations
    from parallel.tensor import division
    from train.layout import check_experts
    from train.metrics.comm_trace import check_heads

    check_experts(model, mesh.expert, config.parallel.transport.experts)
    attention, keys = config.parallel.transport.attention, config.parallel.transport.keys
    if keys != "exact" and config.train.span_tokens is not None:
        raise ValueError(f"parallel.transport.keys={keys}: must be exact with train.span_tokens")
    if mesh.tensor > 1:
        division(model, declarations(model), mesh.tensor)
        if (axes := config.optimizer.get("adamw")) is not None and "vocab" not in axes:
            raise ValueError(f"optimizer.adamw={list(axes)}: must have vocab with parallel.tensor={mesh.tensor}")
    if attention == "ulysses" and mesh.sequence > 1:
        check_heads(model, attention, mesh.sequence, tensor=mesh.tensor)
