"""The side with many ranks: a trainer as any run has it, watched while it makes some steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.matrix_owners import wholes
from parallel.parallelize import parameter_name
from parallel.shards import ByParts
from parallel.tensor import division_of
from train.build import build
from train.execute import Executor
from train.loop import Trainer
from train.verify.trace import Moment, Part, RankTrace, Streams, Trace, written


def run(order: dict[str, Any]) -> None:
    """The entry of each rank: writes its trace to `run_dir`/rank-N.pt.

    order: what `train.build` takes, and `steps`. Collective.
    """
    torch.save(trace(order), file_of(Path(order["run_dir"]), dist.get_rank()))


def file_of(folder: Path, rank: int) -> Path:
    """The file of a rank's trace."""
    return folder / f"rank-{rank}.pt"


def trace(order: dict[str, Any]) -> RankTrace:
    """The trace of the first steps of a run, as this rank has it. Raises FloatingPointError for a gradient that is not
    finite. Collective."""
    trainer = build(order)
    watched, result = _Watched(trainer), Trace()
    for step in range(order["steps"]):
        record, _ = trainer.step()
        if "skipped" in record:
            raise FloatingPointError(f"the guard held step {step + 1} back: a gradient is not finite")
        with ByParts():
            moment = watched.moment(record)
        result |= written(step, moment)
    return RankTrace(result, watched.parts())


class _Watched:
    """Notes a trainer's gradients before and after clipping, its weights and what its layers give."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        mesh = trainer.groups.mesh
        share = mesh.coordinates(dist.get_rank())["tensor"], mesh.tensor
        self.streams = Streams(trainer.model.layers, share)  # type: ignore[arg-type]
        self.gradients: dict[str, Tensor] = {}
        self.clipped: dict[str, Tensor] = {}
        trainer.executor = cast(Executor, _Noting(trainer.executor, self))
        trainer.optimizer.register_step_pre_hook(lambda *_: self.clip())

    def accumulate(self) -> None:
        """Notes the gradients of a step. Collective."""
        self.gradients = self._every({name: p.grad for name, p in self._named().items()})

    def clip(self) -> None:
        """Notes this rank's part of the clipped gradients: no collective, for a rank may fail to step."""
        with ByParts():
            self.clipped = {name: p.grad.clone() for name, p in self._named().items() if p.grad is not None}

    def moment(self, record: dict[str, Any]) -> Moment:
        names = {"loss": "loss", "balance loss": "balance_loss", "z loss": "z_loss", "gradient norm": "grad_norm"}
        scalars = {name: record[key] for name, key in names.items()}
        scalars |= {"index loss": record["index_loss"]} if "index_loss" in record else {}
        scalars |= {"mtp loss": record["mtp_loss"]} if "mtp_loss" in record else {}
        loads = {name: torch.tensor(shares, dtype=torch.float64) for name, shares in record["expert_load"].items()}
        clipped, self.clipped = self._every(self.clipped), {}
        weights = self._every({name: p.detach() for name, p in self._named().items()})
        return Moment(self.streams.take(), scalars, loads, self.gradients, clipped, weights)

    def parts(self) -> dict[str, Part]:
        """The weights of which this rank's tensor group holds several parts."""
        division = division_of(self.trainer.model)
        if division is None:
            return {}
        pieces = {name: piece for name, piece in division.pieces.items() if piece.along is not None}
        return {name: Part(piece.along or 0, piece.segments(division.rank)) for name, piece in pieces.items()}

    def _named(self) -> dict[str, nn.Parameter]:
        return {parameter_name(name): p for name, p in self.trainer.model.named_parameters()}

    def _every(self, held: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The whole tensors of all weights, or a tensor rank's parts of them; zeros for one that is not there.
        Collective."""
        values = {name: held.get(name) for name in self._named()}
        with ByParts():
            zeros = {name: torch.zeros_like(p) for name, p in self._named().items() if values[name] is None}
        there = {name: zeros[name] if x is None else x for name, x in values.items()}
        return {name: x.detach().clone() for name, x in wholes(there).items()}


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
