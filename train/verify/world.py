"""The side with many ranks: a trainer as any run has it, watched while it makes some steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.parallelize import parameter_name
from train.build import build
from train.execute import Executor
from train.loop import Trainer
from train.verify.trace import Moment, Streams, Trace, written


def run(order: dict[str, Any]) -> None:
    """The entry of each rank: writes its trace to `run_dir`/rank-N.pt.

    order: what `train.build` takes, and `steps`. Collective.
    """
    torch.save(trace(order), file_of(Path(order["run_dir"]), dist.get_rank()))


def file_of(folder: Path, rank: int) -> Path:
    """The file of a rank's trace."""
    return folder / f"rank-{rank}.pt"


def trace(order: dict[str, Any]) -> Trace:
    """The trace of the first steps of a run, as this rank has it. A step that the guard held back ends it."""
    trainer = build(order)
    watched, found = _Watched(trainer), Trace()
    for step in range(order["steps"]):
        record, _ = trainer.step()
        if "skipped" in record:
            raise FloatingPointError(f"the guard held step {step + 1} back: a gradient is not finite")
        found |= written(step, watched.moment(record))
    return found


class _Watched:
    """Notes a trainer's gradients before and after clipping, its weights and what its layers give."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.streams = Streams(trainer.model.layers)  # type: ignore[arg-type]
        self.gradients: dict[str, Tensor] = {}
        self.clipped: dict[str, Tensor] = {}
        trainer.executor = cast(Executor, _Noting(trainer.executor, self))
        trainer.optimizer.register_step_pre_hook(lambda *_: self.clip())

    def accumulate(self) -> None:
        """Notes the gradients of a step. Collective."""
        self.gradients = self._every({name: p.grad for name, p in self._named().items()})

    def clip(self) -> None:
        """Notes this rank's part of the clipped gradients: no collective, for a rank may fail to step."""
        self.clipped = {name: p.grad.clone() for name, p in self._named().items() if p.grad is not None}

    def moment(self, record: dict[str, Any]) -> Moment:
        names = {"loss": "loss", "balance loss": "balance_loss", "z loss": "z_loss", "gradient norm": "grad_norm"}
        scalars = {name: record[key] for name, key in names.items()}
        loads = {name: torch.tensor(shares, dtype=torch.float64) for name, shares in record["expert_load"].items()}
        clipped, self.clipped = self._every(self.clipped), {}
        weights = self._every({name: p.detach() for name, p in self._named().items()})
        return Moment(self.streams.take(), scalars, loads, self.gradients, clipped, weights)

    def _named(self) -> dict[str, nn.Parameter]:
        return {parameter_name(name): p for name, p in self.trainer.model.named_parameters()}

    def _every(self, held: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The logical tensors of all weights, zeros for one that is not there. Collective."""
        found = {}
        for name, parameter in self._named().items():
            value = held.get(name)
            found[name] = logical(torch.zeros_like(parameter) if value is None else value).detach().clone()
        return found


class _Noting:
    """An executor whose gradients are looked at before anything is made of them."""

    def __init__(self, executor: Executor, watched: _Watched):
        self._executor, self._watched = executor, watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        tally = self._executor.train(*args, **kwargs)
        self._watched.accumulate()
        return tally


def logical(x: Tensor) -> Tensor:
    """The tensor as one device would hold it. Collective over the ranks that share it."""
    return x.full_tensor() if isinstance(x, DTensor) else x
