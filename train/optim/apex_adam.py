"""apex's FusedAdam, where NVIDIA's apex is installed: one kernel for all weights of a group.

The package named apex on PyPI is another one, a web toolkit: it has no `optimizers`, and is not imported.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.shards import local


def fused_adam() -> Any:
    """The class, None where it is not installed. Raises ImportError where it is, and cannot be imported."""
    spec = importlib.util.find_spec("apex")
    if spec is None or not any(Path(p, "optimizers").exists() for p in spec.submodule_search_locations or ()):
        return None
    from apex.optimizers import FusedAdam

    return FusedAdam


class Apex:
    """The kernel over this rank's shards, for an optimizer around it that has the settings and the state.

    The state is laid out as torch's AdamW has it, sharded as the weights are: a checkpoint does not show which of the
    two has stepped, and either goes on from the other's.
    """

    def __init__(self, groups: list[dict[str, Any]], fused_adam: Any):
        self.shards = {p: nn.Parameter(local(p.detach())) for group in groups for p in group["params"]}
        members = [{"params": [self.shards[p] for p in group["params"]]} for group in groups]
        self.inner = fused_adam(members, adam_w_mode=True)

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """One step of `optimizer`, whose groups are those that this was made with."""
        for group, inner in zip(optimizer.param_groups, self.inner.param_groups, strict=True):
            inner |= {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            states = [self._link(p, optimizer.state[p]) for p in group["params"] if p.grad is not None]
            if states:
                inner["step"] = int(states[0]["step"])  # apex counts by group, and adds the one of this step
                for state in states:
                    state["step"] += 1
        self.inner.step()
        for shard in self.shards.values():
            shard.grad = None

    def _link(self, parameter: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gives the kernel this rank's part of a weight, of its gradient and of its state."""
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        shard = self.shards[parameter]
        shard.data = local(parameter.detach())
        shard.grad = local(parameter.grad) if shard.numel() else None  # type: ignore[arg-type]
        self.inner.state[shard] = {key: local(state[key]) for key in ("exp_avg", "exp_avg_sq")}
        return state
