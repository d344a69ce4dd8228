"""The protocol of engines: build a model on its ranks, step its weights, know weights and moments by name.

An engine cuts weights, gradients and moments among ranks and sums the gradients over them. FSDP2 does so inside the
model and leaves a plain optimizer, so that the loop needs nothing more. Another engine hides gradients and moments in
memory of its own; its optimizer is an `EngineOptimizer`, which runs forward and backward passes, clips, steps, and says
where in each named tensor this rank's part of a state lies. A checkpoint holds named tensors alone: any engine goes on
from any other's.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.lm import LM
from parallel.activation_memory import RECOMPUTE
from parallel.mesh import Meshes
from parallel.pipeline.cut import PipelineCut

MakeOptimizer = Callable[..., Optimizer]


class Engine(Protocol):
    """The settings of an engine; its constructor imports no package of another project."""

    def prepare(
        self, model: LM, meshes: Meshes, *, seed: int, dtype: torch.dtype, cut: PipelineCut | None = None
    ) -> LM:
        """Places a model for forward passes and measurements: from the meta device to initialised, sharded by FSDP."""

    def build(
        self,
        model: LM,
        meshes: Meshes,
        make: MakeOptimizer,
        *,
        seed: int,
        dtype: torch.dtype,
        cut: PipelineCut | None = None,
    ) -> Optimizer:
        """Places a model for training, in place, and returns its optimizer. Collective.

        make: called with groups of parameters. seed, dtype, cut: see `parallel.parallelize`.
        """


class EngineOptimizer(Optimizer):
    """An optimizer of an engine that holds gradients and moments itself. `param_groups` has rates, as any optimizer's.

    model: through it forward passes are run; it has the attributes of the model that was placed.
    """

    model: nn.Module
    factor: float = 1.0  # by which `backward` multiplies a loss

    @abstractmethod
    def begin(self, last: bool) -> None:
        """Comes before the forward pass of each micro-step; only the last one of a step sums gradients over ranks."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's part of the loss; over ranks, gradients are summed and not averaged."""

    @abstractmethod
    def clip(self, largest: float) -> Tensor:
        """Returns the 2-norm of all gradients together, the same on every rank, and has the step that follows scale
        them to at most `largest`. Collective."""

    @abstractmethod
    def named_state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds, `model` and `optimizer.state` by name, as tensors to be read and filled in
        place: whole ones, the same on every rank, or a `train.checkpoints.pieces.stretch` of each."""

    @abstractmethod
    def filled(self) -> None:
        """Takes over what has been written into the tensors of the last `named_state`. Collective."""


def check_activations(recompute: str, tile: int | None) -> None:
    """Raises ValueError for values of the keys that every engine has."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"engine.recompute={recompute}: must be one of {', '.join(RECOMPUTE)}")
    if tile is not None and tile < 1:
        raise ValueError(f"engine.tile={tile}: must be at least 1, or null")
