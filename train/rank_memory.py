"""The memory of a run's ranks, from its configuration alone: shapes of the model, the mesh, the plan's tokens.

The model is divided over tensor ranks and run on the meta device (`models.footprint`); its weights are cut as FSDP, the
expert groups and the pipeline cut them; `parallel.schedule.step_memory` puts both together. `MemoryModel` has the part
that depends on the model, so that a search asks it for one layout after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from models.axes import declarations
from models.footprint import SAMPLES, Footprint, Footprints, footprints
from models.lm import LM
from models.moe import mixtures
from parallel.pipeline import PipelineCut, orders
from parallel.schedule.comm_volume import Ask, AttendCall, ScanCall
from parallel.schedule.mesh import Mesh
from parallel.schedule.step_memory import LayerMemory, Parts, StepMemory
from train.metrics.comm_trace import asked
from train.metrics.width_trace import divided
from train.optim.build import moments
from train.precision import dtypes
from train.run_config import RunConfig
from train.stages import cuts


@dataclass(frozen=True, kw_only=True)
class MemoryLayout:
    """A layout whose memory is asked for. tokens: of a rank in a micro-step. cut: of a pipeline's layers, None without
    one."""

    mesh: Mesh
    tokens: int
    micro_steps: int
    recompute: str
    cut: PipelineCut | None = None


@dataclass(frozen=True)
class _Divided:
    """A model on one of some tensor ranks: footprints of layers and head, numbers of parameters by name."""

    layers: list[Footprints]
    head: Footprints
    sizes: dict[str, tuple[int, int]]  # rows, numbers a row
    asks: tuple[Ask, ...]


class MemoryModel:
    """The memory of a configuration's model in any layout. device: cpu or cuda. samples: tokens that layers run on."""

    def __init__(self, config: RunConfig, device: str, *, samples: Sequence[int] = SAMPLES):
        self.config, self.device, self.samples = config, device, samples
        self.compute, self.master = dtypes(config.precision.compute, device)
        self._divided: dict[tuple[int, int], _Divided] = {}

    def build(self) -> LM:
        """A model on the meta device, as the run's computes."""
        with torch.device("meta"):
            model: LM = self.config.model.build()
        model.compute, model.loss_chunk = self.compute, self.config.train.loss_chunk
        return model

    @cached_property
    def whole(self) -> LM:
        return self.build()

    @cached_property
    def states(self) -> float:
        """Numbers of the optimizer and of averages beside each weight."""
        train = self.config.train
        averages = {"none": 0, "ema": 1, "last": train.average_count}[train.average]
        parameters = sum(p.numel() for p in self.whole.parameters())
        return averages + moments(self.config.optimizer.build(), self.build()) / parameters

    def divided(self, tensor: int, expert: int) -> _Divided:
        """The model on the first of so many tensor ranks, with its share of the experts. Raises ValueError as
        `parallel.tensor.division` does, NotImplementedError for a model whose course depends on data."""
        key = tensor, expert
        if key not in self._divided:
            model = self.build()
            divided(model, tensor, 0)
            sizes = {name: (p.shape[0], p[0].numel()) for name, p in model.named_parameters()}
            spread(model, expert)
            kind = self.device if expert == 1 else "cuda"  # experts elsewhere are not run in turn
            layers, head = footprints(model, self.samples, device=kind, ranks=tensor)
            sequence = self.config.parallel.sequence != 1
            asks = asked(model, device=self.device) if sequence and tensor == 1 else ()
            self._divided[key] = _Divided(layers, head, sizes, asks)
        return self._divided[key]

    def of(self, layout: MemoryLayout) -> Parts:
        """The parts of the fullest rank's peak, in bytes."""
        ranks = range(layout.mesh.pipeline)
        found = [self.step(layout, rank) for rank in ranks]
        return max((step.peak() for step in found), key=lambda parts: sum(parts.values()))

    def step(self, layout: MemoryLayout, rank: int = 0) -> StepMemory:
        """The step of a pipeline rank."""
        mesh, engine = layout.mesh, self.config.engine
        known = self.divided(mesh.tensor, mesh.expert)
        tokens = max(layout.tokens, 1)
        sharding = mesh.data * mesh.expert * mesh.sequence
        experts = {p for name in mixtures(self.whole) for p in known.sizes if p.startswith(f"{name}.") and ".experts." in p}
        held = set(known.sizes) if layout.cut is None else {n for n, r in layout.cut.holders.items() if rank in r}
        own = [i for i in range(len(known.layers)) if layout.cut is None or any(i in layout.cut.cuts[s] for s in layout.cut.stages(rank))]

        def weights(prefix: str | None) -> tuple[float, float]:
            """Bytes of a layer's weights on a rank, whole and sharded; None: of those outside of layers."""
            whole = shard = 0
            for name in held:
                inside = name.startswith("layers.")
                if name.startswith(f"layers.{prefix}.") if prefix is not None else not inside:
                    rows, rest = known.sizes[name]
                    over = sharding
                    if name in experts and mesh.expert > 1:
                        rows, over = rows // mesh.expert, mesh.data * mesh.sequence
                    whole += rows * rest
                    shard += -(-rows // over) * rest
            return whole * self.master.itemsize, shard * self.master.itemsize

        layers = []
        for i in own:
            kept, forward, backward = known.layers[i].at(tokens).under(layout.recompute)
            whole, shard = weights(str(i))
            layers.append(LayerMemory(kept, forward, backward, whole, shard, self._sent(known.asks, layout)))
        root, root_shard = weights(None)
        states = (sum(each.shard for each in layers) + root_shard) * (1 + self.states)
        enters = -(-tokens // mesh.tensor) * self.whole.dim * self.compute.itemsize
        last = layout.cut is None or len(known.layers) - 1 in own
        halves = self.config.parallel.pipeline_schedule == "zero_bubble" and mesh.pipeline > 1
        return StepMemory(
            layers=layers,
            head=self._head(known.head.at(tokens)) if last else None,
            root=root,
            root_shard=root_shard,
            entering=enters,
            states=states,
            alone=sharding == 1,
            reshard=engine.get("reshard_after_forward", True),
            whole=halves,
            micro_steps=layout.micro_steps,
            flying=self._flying(layout, rank),
        )

    @staticmethod
    def _head(found: Footprint) -> LayerMemory:
        return LayerMemory(found.kept, found.forward, found.backward, found.gradients, 0.0)

    def _flying(self, layout: MemoryLayout, rank: int) -> float:
        """Micro-steps whose activations a pipeline rank holds at a time, over those of all its layers."""
        if layout.cut is None or layout.mesh.pipeline == 1:
            return 1.0
        name = self.config.parallel.pipeline_schedule
        order = orders(name, layout.mesh.pipeline, len(layout.cut.cuts), layout.micro_steps)[rank]
        sizes = [len(layers) for layers in layout.cut.cuts]
        held = most = 0
        for kind, stage, _ in order:
            held += {"F": 1, "B": -1, "W": -1}.get(kind, 0) * sizes[stage]
            most = max(most, held)
        return most / sum(sizes[s] for s in layout.cut.stages(rank))

    def _sent(self, asks: Sequence[Ask], layout: MemoryLayout) -> float:
        """Bytes of keys and values that a rank gathers at a time, and of their gradients; of effects, all."""
        ranks = layout.mesh.sequence
        if ranks == 1:
            return 0.0
        most = 0.0
        for ask in asks:
            if isinstance(ask, AttendCall) and ask.window is None and self.config.parallel.transport.attention == "gather":
                block = ranks * layout.tokens * 2 * max(ask.key, ask.value)
                most = max(most, block * (ask.itemsize + max(4, ask.itemsize)))
            if isinstance(ask, ScanCall):
                most = max(most, 2.0 * ranks * (ask.decay + ask.state) * ask.itemsize)
        return most


def spread(model: LM, ranks: int) -> None:
    """Gives a model on the meta device the experts of one of so many ranks."""
    if ranks == 1:
        return
    for moe in mixtures(model).values():
        for name, weight in list(moe.experts.named_parameters(recurse=False)):
            part = torch.nn.Parameter(weight.detach()[: len(weight) // ranks])
            part.declared = weight.declared  # type: ignore[attr-defined]
            moe.experts.register_parameter(name, part)
        moe.experts.num_experts //= ranks


def layout_of(config: RunConfig, model: LM, mesh: Mesh, plan: Any, device: str) -> MemoryLayout:
    """The layout of a run whose first step has this plan. model: on the meta device."""
    most = max(
        sum(end - begin for begin, end in spans)
        for micro in plan.micro_steps
        for group in micro.groups
        for spans in group.spans
    )
    if (limit := config.train.span_tokens) is not None:
        most = min(most, limit)
    cut = None if mesh.pipeline == 1 else PipelineCut.of(model, cuts(config, model, device), mesh.pipeline)
    recompute = str(config.engine.get("recompute", "none"))
    return MemoryLayout(mesh=mesh, tokens=max(most, 1), micro_steps=len(plan.micro_steps), recompute=recompute, cut=cut)
