"""The search for a run's layout: all that the product can run, those that fit a rank's memory, the fastest of them.

Memory is foretold by `train.rank_memory`, seconds by `parallel.schedule.layout_cost`, from costs that were measured on
this machine (`farspan plan cost.profile=true`), or from the model's shapes and a device's figures. Layouts are taken in
the order of their seconds, so that memory is asked for until there are enough that fit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from models.kernels.low_precision import Scaling
from models.lm import LM
from models.moe import mixtures
from parallel.pipeline.cut import PipelineCut
from parallel.pipeline.orders import bubble
from parallel.schedule import Static
from parallel.schedule.adaptive.cost import Cluster, Costs, Wire
from parallel.schedule.devices import DEVICES, REACHED
from parallel.schedule.layout_cost import LayoutWork, StepSeconds, seconds
from parallel.schedule.layouts import LayoutChoice, divisors, meshes, shares
from parallel.schedule.mesh import Mesh
from parallel.schedule.stages import cut, refusal
from parallel.schedule.step_memory import Parts
from train.cost_profile import CostProfile, found_profile, machine_name
from train.engines.refusals import name_of, plain
from train.metrics.comm_trace import asked, expert_calls, expert_units, weight_units
from train.metrics.width_trace import divided, step_calls
from train.parallel_settings import MachineSettings
from train.precision import gathered_weights
from train.rank_memory import MemoryLayout, MemoryModel
from train.run_config import RunConfig
from train.stages import work as stage_work
from train.step_costs import ASSUMED, shaped

USABLE = 0.9  # of a rank's memory: the rest is the runtime's, and what an allocator loses
MOST_PIPELINE = 64  # ranks of a pipeline that are looked at
UNLIMITED = 2.0**60
SIMULATED = 2048  # micro-steps of all stages whose order is walked through; more of them wait as a formula says
TRIED = 400  # layouts whose memory is asked for where none fits


class RankMachine(NamedTuple):
    """The ranks that a layout is for. memory: bytes of a rank. rate: FLOP/s of a rank. wire: by the number of ranks
    from a group's first to its last. per_machine: ranks of a machine. streams: messages overlap with computing.
    source: of rate and wire. profile: measured costs, None where there are none."""

    name: str
    memory: float
    rate: float
    wire: Callable[[int], Wire]
    per_machine: int
    streams: bool
    source: str
    profile: CostProfile | None = None


def machine_of(config: RunConfig, device: str, *, memory: float, threads: int) -> RankMachine:
    """The machine that the configuration names, or this one. memory: bytes of a rank here. Raises ValueError."""
    about = config.parallel.machine
    size = memory if about.memory is None else about.memory * 2**30
    if about.device is not None:
        named = DEVICES[about.device]
        ranks = about.ranks or named.ranks
        size = named.memory if about.memory is None else size
        rate, wire = named.flops * REACHED, lambda span: named.wire(span, per_machine=ranks)
        source = f"{rate / 1e12:,.0f} TFLOP/s a rank, {REACHED:.0%} of what {named.source} say"
        return RankMachine(named.name, size, rate, wire, ranks, True, source)
    rate, assumed = ASSUMED["cpu" if device == "cpu" else "cuda"]
    ranks = about.ranks or config.cluster.workers
    profile = found_profile(config, machine_name(device, threads))
    if profile is None:
        source = f"{rate / 1e12:g} TFLOP/s a rank and {assumed.bandwidth / 1e9:g} GB/s between ranks, which are assumed"
        return RankMachine("this machine", size, rate, lambda span: assumed, ranks, device != "cpu", source)
    wires = {n: Wire(*wire) for n, wire in profile[0].wires.items()} or {1: assumed}

    def measured(span: int) -> Wire:
        return wires[max((n for n in wires if n <= span), default=min(wires))]

    source = f"costs measured on {profile[0].machine}"
    return RankMachine("this machine", size, rate, measured, ranks, device != "cpu", source, profile[0])


def room_of(about: MachineSettings) -> float | None:
    """Bytes that the tensors of a rank may take, by what the configuration says of the machine; None if nothing."""
    if about.memory is not None:
        return about.memory * 2**30 * USABLE
    return None if about.device is None else DEVICES[about.device].memory * USABLE


@dataclass(frozen=True)
class RankedLayout:
    """A layout with its seconds a step, and the parts of its peak of memory."""

    choice: LayoutChoice
    seconds: StepSeconds
    memory: Parts

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


class LayoutSearch:
    """The layouts of a run.

    length, sequences: of a step. check: raises ValueError for a mesh that the product refuses, with the model on the
    meta device.
    """

    def __init__(
        self,
        config: RunConfig,
        device: str,
        machine: RankMachine,
        *,
        length: int,
        sequences: int,
        check: Callable[[RunConfig, Mesh, LM], None],
    ):
        if config.scheduler.target.rpartition(".")[2] != Static.__name__:
            raise ValueError(f"scheduler={config.scheduler.target}: must be static with parallel=auto")
        if not plain(config):
            raise ValueError(f"engine={name_of(config)}: must be fsdp with parallel=auto")
        self.config, self.device, self.machine, self.check = config, device, machine, check
        self.length, self.sequences, self.workers = length, sequences, config.cluster.workers
        given = self._given(config.parallel)
        for name, size in given.items():
            if size < 1 or self.workers % size:
                raise ValueError(f"parallel.{name}={size}: must divide cluster.workers={self.workers}")
            if name in ("replicate", "data", "expert") and size > sequences:
                raise ValueError(f"parallel.{name}={size}: must have a sequence each, and a step has {sequences}")
        self.memory = MemoryModel(config, device)
        self._work: dict[tuple[int, int], LayoutWork] = {}
        self._refused: dict[tuple[int, ...], str | None] = {}
        self._pipelines: dict[int, tuple[PipelineCut, float, list[float]]] = {}
        self._waits: dict[tuple[int, int], float] = {}

    @property
    def room(self) -> float:
        return self.machine.memory * USABLE

    @cached_property
    def ranked(self) -> list[tuple[StepSeconds, LayoutChoice]]:
        """All layouts, the fastest first."""
        every = [(self.seconds(choice), choice) for choice in self.choices()]
        return sorted(every, key=lambda pair: (pair[0].total, str(pair[1])))

    def best(self, count: int) -> list[RankedLayout]:
        """The fastest that fit."""
        fitting = []
        for step, choice in self.ranked:
            layout = RankedLayout(choice, step, self.parts(choice))
            if layout.bytes <= self.room:
                fitting.append(layout)
            if len(fitting) == count:
                break
        return fitting

    def least(self) -> RankedLayout:
        """The layout that takes the least memory, among those that compute the most again."""
        again = self._recompute()[-1]
        small = [(s, c) for s, c in self.ranked if c.recompute == again]
        every = [RankedLayout(choice, step, self.parts(choice)) for step, choice in small[:TRIED]]
        return min(every, key=lambda layout: layout.bytes)

    def choices(self) -> Iterator[LayoutChoice]:
        """All that the product can run. Raises ValueError where it can run none."""
        parallel, schedule, limit = self.config.parallel, self.config.parallel.pipeline_schedule, self._limit()
        none = True
        for mesh in meshes(self.workers, self._sizes(), self._valid):
            groups = mesh.split[0]
            most = None if limit is None else limit * mesh.sequence // self.length
            if groups > self.sequences or most == 0 or mesh.sequence > self.length:
                continue
            for together, steps in shares(self.sequences, groups, most):
                if mesh.pipeline > 1 and refusal(schedule, mesh.pipeline, steps) is not None:
                    continue
                for recompute in self._recompute():
                    none = False
                    yield LayoutChoice(mesh, together, steps, recompute)
        if none:
            why = next((line for line in self._refused.values() if line), "") or (
                f"a step has {self.sequences} sequence{'s' * (self.sequences != 1)} of {self.length:,} tokens"
            )
            given = ", ".join(f"parallel.{n}={s}" for n, s in self._given(parallel).items()) or "parallel.auto=true"
            raise ValueError(f"{given}: leaves no layout of cluster.workers={self.workers}: {why}")

    def seconds(self, choice: LayoutChoice) -> StepSeconds:
        mesh, waits, share = choice.mesh, 0.0, 1.0
        if mesh.pipeline > 1:
            _, share, costs = self._pipeline(mesh.pipeline)
            key = mesh.pipeline, choice.micro_steps
            if mesh.pipeline * choice.micro_steps > SIMULATED:  # 2104.04473, section 2.2
                each = self.config.parallel.stages_per_rank
                self._waits[key] = (mesh.pipeline - 1) / (choice.micro_steps * each + mesh.pipeline - 1)
            elif key not in self._waits:
                passes = [(each, 2 * each) for each in costs]
                self._waits[key] = bubble(self.config.parallel.pipeline_schedule, *key[:1], passes, key[1])
            waits = self._waits[key]
        padded = self.config.parallel.transport.experts == "padded"
        work = self.work(mesh.tensor, mesh.expert)
        return seconds(choice, work, self.length, self.machine.wire, waits=waits, share=share, padded=padded)

    def parts(self, choice: LayoutChoice) -> Parts:
        """Bytes of the fullest rank."""
        return self.memory.parts(self.layout(choice))

    def layout(self, choice: LayoutChoice) -> MemoryLayout:
        """The layout as its memory is asked for."""
        return MemoryLayout(
            mesh=choice.mesh,
            tokens=choice.tokens(self.length),
            micro_steps=choice.micro_steps,
            recompute=choice.recompute,
            cut=self._pipeline(choice.mesh.pipeline)[0] if choice.mesh.pipeline > 1 else None,
        )

    def settled(self, choice: LayoutChoice) -> RunConfig:
        """The configuration with this layout in place of the wish for one."""
        config = self.config
        sizes: dict[str, Any] = dict(choice.mesh.sizes)
        tokens = config.scheduler.get("tokens_per_rank")
        if tokens is None and choice.micro_steps > 1:
            tokens = choice.tokens(self.length)
        return replace(
            config,
            parallel=replace(config.parallel, auto=False, **sizes),
            scheduler=config.scheduler.having(tokens_per_rank=tokens),
            engine=config.engine.having(recompute=choice.recompute),
        )

    @cached_property
    def costs(self) -> Costs:
        """Those of groups of ranks that share sequences, by their sizes."""
        plain = replace(self.config, engine=self.config.engine.having(recompute="none"))
        cluster = Cluster(self.machine.name, self.workers, UNLIMITED, {1: self.machine.wire(1)})
        costs = shaped(
            plain,
            self.memory.build(),
            cluster,
            device=self.device,
            rate=self.machine.rate,
            launch=0.0,
            recompute=True,
            spans=2,
        )
        return costs if self.machine.profile is None else self.machine.profile.applied(costs, 0.0, 0.0)

    @cached_property
    def coded(self) -> dict[str, Scaling]:
        """The scaling of each weight that ranks gather in few bits."""
        return gathered_weights(self.config.precision, self.memory.whole, self.device)

    def work(self, tensor: int, expert: int) -> LayoutWork:
        if (tensor, expert) not in self._work:
            model, engine = self.memory.build(), self.config.engine
            notes, _ = divided(model, tensor, 0)
            if tensor > 1:
                asked(model, device=self.device)
            options: dict[str, Any] = {
                "itemsize": self.memory.master.itemsize,
                "reshard": engine.get("reshard_after_forward", True),
            }
            options["gradients"] = engine.get("gradients", "high")
            # A sequence group reaches over the ranks of its tensor groups.
            wires = {size: self.machine.wire(size * tensor) for size in self.costs.sizes}
            model_costs, cluster = self.costs.model, replace(self.costs.cluster, wires=wires)
            self._work[tensor, expert] = LayoutWork(
                Costs(model_costs, cluster, self.costs.sizes),
                Counter(step_calls(model, notes)) if tensor > 1 else Counter(),
                Counter(expert_calls(model)) if expert > 1 else Counter(),
                weight_units(model, **options, experts=expert, coded=self.coded),
                expert_units(model, **options, experts=expert, coded=self.coded) if expert > 1 else [],
                model.dim * model.compute.itemsize,
                self.machine.streams,
            )
        return self._work[tensor, expert]

    def _limit(self) -> int | None:
        limit: int | None = self.config.scheduler.get("tokens_per_rank")
        return limit

    def _recompute(self) -> list[str]:
        given = str(self.config.engine.get("recompute", "none"))
        return (
            ["none", "selective", "full"] if given == "none" and "recompute" in self.config.engine.values else [given]
        )

    @staticmethod
    def _given(parallel: object) -> dict[str, int]:
        """The sizes that the configuration says."""
        sizes = {name: getattr(parallel, name) for name in ("pipeline", "replicate", "expert", "tensor")}
        some = {name: size for name, size in sizes.items() if size > 1}
        return some | {n: s for n in ("data", "sequence") if (s := getattr(parallel, n)) is not None}

    def _sizes(self) -> dict[str, list[int]]:
        """The sizes of each dimension that are looked at; no `data` where it takes what the others leave."""
        every, given = divisors(self.workers), self._given(self.config.parallel)
        experts = [moe.num_experts for moe in mixtures(self.memory.whole).values()]
        sizes = {
            "pipeline": [n for n in every if n <= min(len(self.memory.whole.kinds), MOST_PIPELINE)],
            "replicate": every,
            "expert": [n for n in every if experts and math.gcd(*experts) % n == 0] or [1],
            "sequence": [n for n in every if n in self.costs.sizes],
            "tensor": [n for n in every if self.machine.per_machine % n == 0],
        }
        return sizes | {name: [size] for name, size in given.items()}

    def _valid(self, mesh: Mesh) -> bool:
        """Says whether the product takes a mesh: asked once for those that are alike to its checks."""
        heads = mesh.sequence if self.config.parallel.transport.attention == "ulysses" else 1
        key = (mesh.expert, mesh.tensor, heads, mesh.replicate > 1, mesh.pipeline)
        if key not in self._refused:
            layers = self._pipeline(mesh.pipeline)[0].cuts if mesh.pipeline > 1 else None
            lengths = None if layers is None else [len(each) for each in layers]
            changes: dict[str, Any] = {**mesh.sizes, "pipeline_layers": lengths}
            parallel = replace(self.config.parallel, auto=False, **changes)
            try:
                self.check(replace(self.config, parallel=parallel), mesh, self.memory.whole)
                self._refused[key] = None
            except ValueError as error:
                self._refused[key] = str(error)
        return self._refused[key] is None

    @cached_property
    def _stage_work(self) -> tuple[tuple[float, ...], float]:
        work = stage_work(self.memory.build(), self.length, self.device)
        return work.layers, work.head

    def _pipeline(self, ranks: int) -> tuple[PipelineCut, float, list[float]]:
        """The cut of a pipeline of so many ranks, the share of its fullest rank, and the work of each stage."""
        if ranks not in self._pipelines:
            layers, head = self._stage_work
            ranges = cut(layers, ranks * self.config.parallel.stages_per_rank, head=head)
            costs = [sum(layers[i] for i in each) for each in ranges]
            costs[-1] += head
            by_rank = [sum(costs[r::ranks]) for r in range(ranks)]
            stages = PipelineCut.of(self.memory.whole, ranges, ranks)
            self._pipelines[ranks] = stages, max(by_rank) / sum(costs), costs
        return self._pipelines[ranks]
