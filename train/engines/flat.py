"""An optimizer that knows by name what another project's lays end to end in a row and cuts among ranks.

DeepSpeed and Megatron-core both do so: a rank steps a stretch of a parameter, or of many in one tensor, without names.
Here each stretch has its parameter's name and its place there. So a checkpoint holds the same tensors as FSDP's, and
nothing is gathered to write one.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.parallelize import parameter_name
from train.checkpoints.pieces import stretch
from train.engines.engine import EngineOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class Stretch(NamedTuple):
    """Elements of a parameter of this shape, `length` from `begin` on, that lie from `at` on in a tensor that this rank
    steps, flat [N]."""

    parameter: nn.Parameter
    shape: torch.Size
    begin: int
    stepped: Tensor
    at: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Its elements in a tensor that is laid out as the one that is stepped."""
        return flat.detach()[self.at : self.at + self.length]


class FlatOptimizer(EngineOptimizer):
    """model: see `EngineOptimizer`. placed: the model itself. inner: the AdamW that takes the steps."""

    cuts_weights = False  # whether ranks have no more than their stretches of the weights

    def __init__(self, model: nn.Module, placed: nn.Module, inner: Optimizer):
        self.model, self.placed, self.inner = model, placed, inner
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state
        self.waiting = False  # gradients, for a step or to be dropped
        self._steps: dict[str, Tensor] = {}
        for part in self.stretches():
            self._start(part.stepped)

    @abstractmethod
    def stretches(self) -> Iterator[Stretch]:
        """Yields this rank's parts of all parameters."""

    @abstractmethod
    def gradients(self) -> Iterator[Tensor]:
        """Yields this rank's parts of all gradients, once they are summed over ranks."""

    @torch.no_grad()
    def norm(self, device: torch.device) -> Tensor:
        """The 2-norm of all gradients, float64 [], the same on every rank. Collective."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for gradient in self.gradients():
            total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square().to(device)
        dist.all_reduce(total)
        return total.sqrt()

    def named_state(self) -> dict[str, Any]:
        names = {p: parameter_name(name) for name, p in self.placed.named_parameters()}
        weights = {parameter_name(name): value for name, value in self.placed.state_dict().items()}
        if self.cuts_weights:
            weights = {name: value for name, value in weights.items() if name not in names.values()}
        moments, self._steps = dict[str, dict[str, Any]](), {}
        for part in self.stretches():
            name, state = names[part.parameter], self.inner.state[part.stepped]
            if self.cuts_weights:
                weights[name] = stretch(part.shape, part.begin, part.of(part.stepped))
            moments[name] = {key: stretch(part.shape, part.begin, part.of(state[key])) for key in MOMENTS}
            self._steps[name] = torch.as_tensor(state["step"], dtype=torch.float32).clone()
            moments[name]["step"] = self._steps[name]
        return {"model": weights, "optimizer": {"state": moments}}

    @torch.no_grad()
    def filled(self) -> None:
        names = {p: parameter_name(name) for name, p in self.placed.named_parameters()}
        for part in self.stretches():
            if not self.cuts_weights:
                part.of(part.stepped).copy_(part.parameter.flatten()[part.begin : part.begin + part.length])
            state, count = self.inner.state[part.stepped], self._steps[names[part.parameter]]
            state["step"] = count.to(state["step"].device).clone() if torch.is_tensor(state["step"]) else int(count)

    def _start(self, stepped: Tensor) -> None:
        """Gives a tensor the state that its first step would."""
        state = self.inner.state[stepped]
        if state:
            return
        state |= {key: torch.zeros_like(stepped, requires_grad=False) for key in MOMENTS}
        if type(self.inner).__name__ == "DeepSpeedCPUAdam":
            state["step"] = 0
        else:
            fused = self.defaults.get("fused")
            state["step"] = torch.zeros((), dtype=torch.float32, device=stepped.device if fused else "cpu")
