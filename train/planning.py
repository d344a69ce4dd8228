"""Plans of the adaptive scheduler in training: made by rank 0, ahead of their step, logged, and replayed on resume.

The plan of a step depends on its lengths and on costs that rank 0 alone holds, speeds of ranks among them, so the other
ranks are told. It is made beside the step before, on a thread of rank 0, as soon as the next batch is there. Every plan
is a line of plans/plans.jsonl before its step runs. A run that goes on takes the plans of steps that it had planned
before, so that its losses are bitwise those of a run that was never interrupted: without the log they would depend on
how fast ranks were at the time.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data import reading
from data.pack import Packed, unpacked
from parallel.mesh import Groups
from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.packing import Packing
from parallel.schedule.adaptive.scheduler import Adaptive
from parallel.schedule.adaptive.stragglers import Speeds
from parallel.schedule.plan import Plan
from train.hooks import Hook
from train.precision import dtypes
from train.run_config import RunConfig
from train.state import TrainProgress
from train.step_costs import costs_of
from train.tracking.record import JsonlWriter

LOG = "plans.jsonl"


class _Chosen(NamedTuple):
    """The packing of a step, and `adaptive` or `static`."""

    kind: str
    packing: Packing


@dataclass(frozen=True)
class _Ahead:
    """A plan that a thread makes: by which state of the costs, of which lengths."""

    version: int
    made: Future[tuple[tuple[int, ...], _Chosen]]


class Planning(Hook):
    """Plans the steps of training.

    costs: on rank 0, None elsewhere. ranks: as many as a plan knows. following: the batch behind the last one that was
    asked for, if it is being made. folder: of the log; None on ranks that write none. settings: all that a plan depends
    on besides lengths and speeds.
    """

    key: ClassVar[str] = "planning"

    def __init__(
        self,
        scheduler: Adaptive,
        costs: Costs | None,
        *,
        ranks: int,
        progress: TrainProgress,
        following: Callable[[], Future[list[Packed]] | None],
        folder: Path | None,
        settings: str,
        say: Callable[[str], None],
    ):
        self._scheduler, self._costs, self._progress, self._following = scheduler, costs, progress, following
        self._settings, self._say, self._folder = zlib.crc32(settings.encode()), say, folder
        self._ranks, self._alone = ranks, dist.get_world_size() == 1
        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")  # no word to a device
        self._speeds = Speeds(self._ranks) if costs is not None and scheduler.stragglers else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planning") if costs is not None else None
        self._ahead: _Ahead | None = None
        self._version = 0
        self._logged: dict[int, Any] = {}
        self._log: JsonlWriter | None = None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        groups: Groups,
        following: Callable[[], Future[list[Packed]] | None],
        progress: TrainProgress,
        run_dir: Path,
        device: str,
        say: Callable[[str], None],
    ) -> "Planning":
        """The planner of a run whose scheduler is adaptive. Says, on rank 0, by which costs it plans."""
        scheduler, costs = config.scheduler.build(), None
        if groups.first:
            with torch.device("meta"):
                model = config.model.build()
            model.compute = dtypes(config.precision.compute, device)[0]
            costs, line = costs_of(
                config, scheduler, model, device=device, mesh=groups.mesh, threads=torch.get_num_threads()
            )
            say(line)
        values = {key: value for key, value in config.scheduler.values.items() if key != "simulate"}
        return cls(
            scheduler,
            costs,
            ranks=groups.world,
            progress=progress,
            following=following,
            folder=None if costs is None else run_dir / "plans",
            settings=json.dumps(values, sort_keys=True),
            say=say,
        )

    def next(self, windows: Sequence[Packed]) -> tuple[list[Packed], Plan]:
        """The sequences of the next step's batch, and their plan, the same on every rank. Collective.

        Raises ValueError, on every rank, for a sequence that fits no group.
        """
        batch = self._sequences(windows)
        step, lengths = self._progress.state.step + 1, tuple(len(s.tokens) for s in batch)
        message: list[Any] = [None]
        if self._costs is not None:
            try:
                message = [self._packing(step, lengths).rows()]
            except ValueError as error:
                message = [str(error)]
        if not self._alone:
            dist.broadcast_object_list(message, group=self._group)
        if isinstance(message[0], str):
            raise ValueError(message[0])
        self._begin()
        return batch, Packing.of(message[0]).plan(step, lengths, self._ranks, self._scheduler.layout)

    def observe(self, plan: Plan, seconds: Sequence[float]) -> None:
        """After a step: takes the seconds that each rank computed in its layers; a rank that is slow gets less work
        from the next step on."""
        if self._speeds is None or self._costs is None or min(seconds) <= 0:
            return
        line = self._speeds.observe(_expected(self._costs, plan, self._ranks), seconds)
        if line is not None:
            self._believe(self._speeds.believed)
            self._say(f"step {plan.step}: {line}")

    def state(self) -> dict[str, Any] | None:
        return None if self._speeds is None else self._speeds.state()

    def load(self, state: dict[str, Any]) -> None:
        """Takes back the speeds of a run of as many ranks, and the plans that were logged behind where it stands."""
        if self._costs is None:
            return
        if self._speeds is not None:
            self._speeds = Speeds(self._ranks)
            if len(state.get("believed", ())) == self._ranks:
                self._speeds.load(state)
            self._believe(self._speeds.believed)
        if self._folder is not None:
            self._logged = logged(self._folder / LOG, self._progress.state.step)

    def _sequences(self, windows: Sequence[Packed]) -> list[Packed]:
        return unpacked(windows) if self._scheduler.documents else list(windows)

    def _believe(self, speeds: np.ndarray) -> None:
        assert self._costs is not None
        cluster = replace(self._costs.cluster, speeds=None if (speeds == 1).all() else tuple(speeds.tolist()))
        self._costs = Costs(self._costs.model, cluster, self._costs.sizes)
        self._version += 1

    def _packing(self, step: int, lengths: tuple[int, ...]) -> Packing:
        """The plan of a step: the logged one, else the one that was made ahead, else one made now."""
        row = self._logged.pop(step, None)
        same = {"ranks": self._ranks, "settings": self._settings, "lengths": _digest(lengths)}
        if row is not None and same.items() <= row.items():
            packing = Packing.of(row["micro_steps"])
            packing.check(self._ranks, len(lengths))
            return packing
        chosen = self._taken(lengths)
        if self._folder is not None:
            if self._log is None:
                self._log = JsonlWriter(self._folder / LOG)
            self._log.log({"step": step, **same, "kind": chosen.kind, "micro_steps": chosen.packing.rows()})
        return chosen.packing

    def _taken(self, lengths: tuple[int, ...]) -> _Chosen:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.version == self._version:
            try:
                made = ahead.made.result()
            except Exception:  # of a batch that nobody may ask for; one that is wrong says so here
                made = None
            if made is not None and made[0] == lengths:
                return made[1]
        assert self._costs is not None
        return _Chosen(*self._scheduler.pack(self._costs, lengths))

    def _begin(self) -> None:
        """Begins to plan the step after this one, by the costs of now."""
        if self._thread is None or self._costs is None or (next_ := self._following()) is None:
            return
        costs = self._costs

        def make() -> tuple[tuple[int, ...], _Chosen]:
            lengths = tuple(len(s.tokens) for s in self._sequences(next_.result()))
            return lengths, _Chosen(*self._scheduler.pack(costs, lengths))

        self._ahead = _Ahead(self._version, self._thread.submit(make))


def logged(path: Path, after: int) -> dict[int, Any]:
    """The newest logged plan of each step behind `after`, by step; lines that are no plan's are passed over."""
    plans: dict[int, Any] = {}
    if path.exists():
        with reading.opened(path) as file:
            for line in file:
                try:
                    row = json.loads(line)
                    if row["step"] > after:
                        plans[row["step"]] = row
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
    return plans


def _digest(lengths: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(lengths, dtype="<i8").tobytes())


def _expected(costs: Costs, plan: Plan, ranks: int) -> np.ndarray:
    """Seconds [ranks] of computing that ranks of speed 1 need for a plan."""
    own = costs.computing(np.asarray(plan.lengths, dtype=np.float64)).sum(0)
    seconds = np.zeros(ranks)
    for micro in plan.micro_steps:
        for group in micro.groups:
            if group.sequences:
                seconds[list(group.ranks)] += own[list(group.sequences)].sum() / len(group.ranks)
    return seconds
