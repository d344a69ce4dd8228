"""Writing a checkpoint, by all ranks together: what each holds of it, then the files.

Two parts, so that the second can run beside training: `contents` names the tensors of this moment, in the thread that
trains, and `write` makes a checkpoint of them. `write` alone touches the disk, and its collectives are those of the
group that it is given.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import Optimizer

from parallel.collectives import Comm
from parallel.parallelize import parameter_name
from parallel.shards import ByParts, local
from parallel.tensor import Division, division_of
from train.checkpoints import stored
from train.checkpoints.checkpoint import FORMAT, MANIFEST, prune
from train.checkpoints.disk import DiskError, checksum, no_room, sync_folder, write_text
from train.checkpoints.stored import METADATA
from train.engines.engine import EngineOptimizer


class Contents(NamedTuple):
    """The tensors of a checkpoint on this rank.

    state: by name and nested: `model`, `optimizer`, and those of hooks. parameters: the shape and the dtype of each of
    the model's, as the manifest has them. division: of the model, where tensor ranks divide it.
    """

    state: dict[str, Any]
    parameters: dict[str, Any]
    division: Division | None = None


def contents(
    model: nn.Module, optimizer: Optimizer, parts: dict[str, Any] | None = None, pipeline: Comm | None = None
) -> Contents:
    """Returns what a checkpoint of this moment holds: the tensors themselves, no copies. Collective.

    parts: tensors beside those of the model and the optimizer, by name. pipeline: the ranks that have other layers.
    """
    if isinstance(optimizer, EngineOptimizer):
        state = optimizer.named_state()
    else:
        with ByParts():
            weights, moments = get_state_dict(model, optimizer)  # settings are the run's own: never read again
        state = {"model": weights, "optimizer": {"state": moments["state"]}}
    return Contents({**state, **(parts or {})}, _parameters(model, pipeline), division_of(model))


def not_finite(held: Contents) -> str | None:
    """The first weight, or else moment, with a number that is not finite on any rank; None where all are. Collective
    over all ranks."""
    parts: dict[str, Any] = {key: held.state[key] for key in ("model", "optimizer") if key in held.state}
    tensors = {
        name: local(x)
        for name, x in flatten_state_dict(parts)[0].items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    flags = [x.isfinite().all() for x in tensors.values()]  # read afterwards: a device need not stop for each
    bad = [name for name, finite in zip(tensors, flags, strict=True) if not finite]
    ranks: list[str | None] = [None for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, bad[0] if bad else None)
    return next((name for name in ranks if name is not None), None)


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    facts: dict[str, Any],
    *,
    keep: int,
    companions: Sequence[Path] = (),
    parts: dict[str, Any] | None = None,
    pipeline: Comm | None = None,
) -> Path:
    """`write` of the `contents` of this moment. Collective."""
    return write(folder, contents(model, optimizer, parts, pipeline), facts, keep=keep, companions=companions)


def write(
    folder: Path,
    held: Contents,
    facts: dict[str, Any],
    *,
    keep: int,
    companions: Sequence[Path] = (),
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes `folder/step-N` from every rank and keeps the newest `keep`. Returns its path. Collective over `group`,
    which is all ranks; None for the default one.

    companions: files that travel with it, so that it is of use without its run: configuration, tokenizer, corpus card.
    Raises on every rank what any of them has met, DiskError for a full disk; the checkpoints before are then whole.
    """
    final = folder / f"step-{facts['step']}"
    aside = final.with_suffix(".partial")

    def prepare() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for companion in companions:
            shutil.copyfile(companion, aside / companion.name)

    def complete() -> None:
        manifest = {"format": FORMAT, **facts, "model": held.parameters, "files": files}
        write_text(aside / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        sync_folder(folder)
        prune(folder, facts["step"], keep=keep)

    try:
        _on_first(prepare, group)
        files = _write_tensors(aside, held, [companion.name for companion in companions], group)
        _on_first(complete, group)
    except BaseException as error:  # CheckpointException is no Exception
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        if (full := no_room(error)) is None:
            raise
        raise DiskError(f"{final.name} cannot be saved in {folder}: {full}") from error
    return final


def _on_first(action: Callable[[], None], group: dist.ProcessGroup | None) -> None:
    """Runs `action` on rank 0, while the others wait; raises on every rank what it has raised there. Collective."""
    outcome: list[Any] = [None]
    own: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            own = error
            outcome = [error if isinstance(error, OSError) else RuntimeError(f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if (failed := own or outcome[0]) is not None:
        raise failed


def _parameters(model: nn.Module, pipeline: Comm | None) -> dict[str, Any]:
    """Returns the shape and the dtype of every parameter, those of other stages included. Collective."""
    whole = division_of(model)
    shapes = {} if whole is None else {name: piece.shape for name, piece in whole.pieces.items()}
    own = {
        (name := parameter_name(n)): [
            list(shapes.get(name, getattr(p, "ds_shape", p.shape))),  # that of a parameter which DeepSpeed has cut
            str(p.dtype).removeprefix("torch."),
        ]
        for n, p in model.named_parameters()
    }
    if pipeline is None:
        return own
    ranks: list[dict[str, Any]] = [{} for _ in pipeline.ranks]
    dist.all_gather_object(ranks, own, group=pipeline.group)
    return {name: tensor for rank in ranks for name, tensor in rank.items()}


def _write_tensors(aside: Path, held: Contents, names: list[str], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Writes this rank's part, and returns what the manifest says of all ranks' files. Collective.

    Raises on every rank what any of them has met.
    """
    planner = stored.TensorSavePlanner(held.division)
    dcp.save(held.state, checkpoint_id=str(aside), planner=planner, process_group=group)
    rank = dist.get_rank()
    own = {METADATA, *names} if rank == 0 else set()
    mine = [p for p in aside.iterdir() if p.name.startswith(f"__{rank}_") or p.name in own]
    sums: list[Any] = [None] * dist.get_world_size()
    try:
        checksums: Any = {p.name: checksum(p, sync=True) for p in mine}
    except OSError as error:  # a disk may tell only now that it is full
        checksums = error
    dist.all_gather_object(sums, checksums, group=group)
    if failed := [part for part in sums if isinstance(part, OSError)]:
        raise failed[0]
    return {name: value for part in sums for name, value in part.items()}
