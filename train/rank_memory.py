"""The memory of a run's ranks, from its configuration alone: shapes of the model, the mesh, the plan's tokens.

The model is divided over tensor ranks and run on the meta device (`models.footprint`); its weights are cut as FSDP, the
expert groups and the pipeline cut them; `parallel.schedule.step_memory` puts both together. A `MemoryModel` remembers
what it has run, so that a search may ask it for one layout after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.axes import declarations
from models.footprint import SAMPLES, Footprint, Inputs, between, footprints
from models.kernels.coded_weight import CodedWeight, as_matrix
from models.kernels.low_precision import BF16, DTYPES, Codes, Scaling, shares
from models.lm import LM
from models.moe import mixtures
from models.recipes import gathered_weights as gathered_weights_of
from parallel.pipeline.cut import PipelineCut
from parallel.pipeline.orders import HALVES, orders
from parallel.schedule.comm_volume import Ask, AttendCall, ScanCall
from parallel.schedule.mesh import Mesh
from parallel.schedule.stages import in_flight
from parallel.schedule.step_memory import STATES, LayerMemory, Parts, StepMemory
from train.distill_settings import DistillSettings
from train.metrics.comm_trace import asked
from train.metrics.width_trace import divided
from train.optim.build import build_optimizer, moments
from train.precision import dtypes, follow, gathered_weights
from train.run_config import ObjectConfig, RunConfig
from train.settings import PrecisionSettings
from train.stages import cuts

TEACHER = "teacher"
ROOT = ""  # in place of a layer's name: what is in no layer


@dataclass(frozen=True, kw_only=True)
class MemoryLayout:
    """A layout whose memory is asked for. tokens: of a rank in a micro-step. cut: of a pipeline's layers, None without
    one."""

    mesh: Mesh
    tokens: int
    micro_steps: int
    recompute: str
    cut: PipelineCut | None = None


class _Weight(NamedTuple):
    """A parameter of a tensor rank: name, rows, numbers a row; whether it is of experts. gathered, kept: bytes a
    number, gathered and as the optimizer changes it."""

    name: str
    rows: int
    rest: int
    expert: bool
    gathered: int
    kept: int


class _Bytes(NamedTuple):
    """Bytes of some weights on a rank. whole, shard: of their gradients. gathered, kept: theirs, as in `_Weight`."""

    whole: float
    shard: float
    gathered: float
    kept: float


class MemoryModel:
    """The memory of a configuration's model in any layout. device: cpu or cuda. exact: layers run on the very number of
    tokens, where that is not too many."""

    def __init__(self, config: RunConfig, device: str, *, exact: bool = False):
        self.config, self.device, self.exact = config, device, exact
        self.compute, self.master = dtypes(config.precision.compute, device)
        self._models: dict[tuple[int, int], LM] = {}
        self._runs: dict[tuple[int, int, bool, bool, int], tuple[list[Footprint], Footprint]] = {}
        self._weights: dict[int, dict[str, list[_Weight]]] = {}
        self._updates: dict[tuple[int, int], float] = {}

    def build(self) -> LM:
        """A model on the meta device, which computes as the run's does."""
        with torch.device("meta"):
            model: LM = self.config.model.build()
        model.compute, model.loss_chunk = self.compute, self.config.train.loss_chunk
        return model

    @cached_property
    def whole(self) -> LM:
        return self.build()

    @cached_property
    def beside(self) -> float:
        """Numbers of the optimizer and of averages beside each weight."""
        train = self.config.train
        averages = {"none": 0, "ema": 1, "last": train.average_count}[train.average]
        parameters = sum(p.numel() for p in self.whole.parameters())
        return averages + moments(self.config.optimizer.build(), self.build()) / parameters

    @cached_property
    def few(self) -> dict[str, Scaling]:
        """The scaling of each weight that ranks gather in few bits."""
        return gathered_weights(self.config.precision, self.whole, self.device)

    @property
    def rounded(self) -> bool:
        """Says whether these weights are kept in bf16."""
        return self.config.precision.masters == "bf16"

    @property
    def copies(self) -> int:
        """The copies of weights and optimizer state in a rank's memory: two where checkpoints are written beside
        training on a CPU."""
        train = self.config.train
        beside = train.checkpoint_async and (train.checkpoint_every or train.total_tokens) < train.total_tokens
        return 2 if beside and self.device == "cpu" else 1

    @cached_property
    def asks(self) -> tuple[Ask, ...]:
        return asked(self.whole, device=self.device)

    def parts(self, layout: MemoryLayout) -> Parts:
        """The parts of the fullest rank's peak, in bytes. Raises ValueError as `parallel.tensor.division` does,
        NotImplementedError for a model whose course depends on data."""
        steps = [self.step(layout, rank) for rank in range(layout.mesh.pipeline)]
        peaks = [step.peak() for step in steps]
        if self.teacher is not None:
            stays, reads = self._taught(self.teacher, layout)
            peaks = [parts | {TEACHER: stays} for parts in peaks]
            peaks += [{STATES: step.states, TEACHER: reads} for step in steps]
        return max(peaks, key=lambda parts: sum(parts.values()))

    @cached_property
    def teacher(self) -> MemoryModel | None:
        """That of the model that the run learns from, where its checkpoint has been found."""
        path = self.config.train.distill.teacher
        if path is None:
            return None
        from train.checkpoints import checkpoint  # torch's readers, a second that other checks do without
        from train.checkpoints.hf_reader import is_folder
        from train.distill import section_of

        if not (is_folder(Path(path)) or (Path(path) / checkpoint.MANIFEST).exists()):
            return None
        train = replace(self.config.train, distill=DistillSettings())
        precision = PrecisionSettings(compute=self.config.precision.compute)  # a teacher's weights stay high
        config = replace(self.config, model=ObjectConfig(section_of(Path(path))), train=train, precision=precision)
        return MemoryModel(config, self.device, exact=self.exact)

    def _taught(self, teacher: MemoryModel, layout: MemoryLayout) -> tuple[float, float]:
        """The bytes of a teacher beside the model's step, and the most of its own pass, in which nothing is saved.

        After the pass its weights stay as they are sharded, those outside of its layers gathered, and all of them where
        the engine keeps weights for a backward pass; and what the objective needs: the streams between its layers, or
        that before its head, and beside the model's logits seven tensors as large, a chunk at a time.
        """
        step, settings = teacher.step(layout), self.config.train.distill
        stream, gathers = layout.tokens * teacher.whole.dim * teacher.compute.itemsize, not step.alone
        shards = sum(each.shard for each in step.layers) + step.root_shard
        kept = step.root + (0.0 if step.reshard else sum(each.whole for each in step.layers)) if gathers else 0.0
        if settings.target == "hidden":
            made = (len(step.layers) + 1) * float(stream)
        else:
            chunk = min(self.whole.loss_chunk or layout.tokens, layout.tokens)
            made = stream + 7.0 * chunk * self.whole.vocabulary * torch.float32.itemsize
        passes = [each.forward + (2 * each.whole if gathers else 0.0) for each in step.layers]
        return shards + kept + made, shards + kept + made + max(passes)

    def largest(self, mesh: Mesh) -> tuple[str, float]:
        """The largest weight of a rank of such a mesh, before it is sharded: its name and bytes."""
        weights = [w for several in self.weights(mesh.tensor).values() for w in several]
        sizes = {w.name: w.rows // (mesh.expert if w.expert else 1) * w.rest * self.master.itemsize for w in weights}
        name = max(sizes, key=lambda name: sizes[name])
        return name, sizes[name]

    def step(self, layout: MemoryLayout, rank: int = 0) -> StepMemory:
        """The step of a pipeline rank."""
        mesh, cut = layout.mesh, layout.cut
        runs, head = self._at(layout)
        count = len(runs)
        own = list(range(count)) if cut is None else [i for s in cut.stages(rank) for i in cut.cuts[s]]
        sent, sizes = self._sent(layout), dict[tuple[Any, ...], _Bytes]()
        weights, layers, kept = self.weights(mesh.tensor), [], 0.0
        for i in own:
            several = weights.get(str(i), [])
            alike = tuple(w[1:] for w in several)
            if alike not in sizes:
                sizes[alike] = self._bytes(several, mesh)
            saved, forward, backward, half = runs[i].under(layout.recompute)
            size = sizes[alike]
            layers.append(LayerMemory(saved, forward, backward, size.whole, size.shard, sent, half, size.gathered))
            kept += size.kept
        outside = [w for w in weights[ROOT] if cut is None or rank in cut.holders[w.name]]
        root, root_shard, *_ = self._bytes(outside, mesh)
        last = cut is None or count - 1 in own
        loss = LayerMemory(head.saved, head.forward, head.backward, head.gradients, 0.0) if last else None
        return StepMemory(
            layers=layers,
            head=loss,
            root=root,
            entering=-(-layout.tokens // mesh.tensor) * self.whole.dim * self.compute.itemsize,
            states=(kept + root_shard + (sum(each.shard for each in layers) + root_shard) * self.beside) * self.copies,
            alone=mesh.data * mesh.expert * mesh.sequence == 1,
            reshard=self.config.engine.get("reshard_after_forward", True),
            whole=self._halves(mesh),
            micro_steps=layout.micro_steps,
            flying=self._flying(layout, rank),
            root_shard=root_shard,
            update=self._update(mesh),
        )

    def weights(self, tensor: int) -> dict[str, list[_Weight]]:
        """The parameters of one of so many tensor ranks, by layer."""
        if tensor not in self._weights:
            model = self._divided(tensor, 1)
            experts = {id(p) for moe in mixtures(model).values() for p in moe.experts.parameters()}
            by_layer: dict[str, list[_Weight]] = {ROOT: []}
            for name, p in model.named_parameters():
                layer = name.split(".")[1] if name.startswith("layers.") else ROOT
                few = DTYPES[self.few[name].format].itemsize if name in self.few else self.master.itemsize
                kept = min(2, self.master.itemsize) if name in self.few and self.rounded else self.master.itemsize
                sizes = p.shape[0], math.prod(p.shape[1:]), id(p) in experts, few, kept
                by_layer.setdefault(layer, []).append(_Weight(name, *sizes))
            self._weights[tensor] = by_layer
        return self._weights[tensor]

    def _bytes(self, weights: Sequence[_Weight], mesh: Mesh) -> _Bytes:
        """FSDP shards rows, as many on each rank."""
        whole = shard = gathered = kept = 0
        alike = mesh.data * mesh.sequence
        for w in weights:
            rows, ranks = (w.rows // mesh.expert, alike) if w.expert else (w.rows, alike * mesh.expert)
            whole += rows * w.rest
            gathered += rows * w.rest * w.gathered
            shard += -(-rows // ranks) * w.rest
            kept += -(-rows // ranks) * w.rest * w.kept
        return _Bytes(whole * self.master.itemsize, shard * self.master.itemsize, gathered, kept)

    def _divided(self, tensor: int, expert: int) -> LM:
        if (tensor, expert) not in self._models:
            model = self.build()
            follow(self.config.precision, model, self.device)
            divided(model, tensor, 0)
            _spread(model, expert)
            _gathered(model, self.master)
            self._models[tensor, expert] = model
        return self._models[tensor, expert]

    def _at(self, layout: MemoryLayout) -> tuple[list[Footprint], Footprint]:
        """Footprints of layers and head."""
        tokens, mesh = max(layout.tokens, 1), layout.mesh
        run = partial(self._run, mesh.tensor, mesh.expert, mesh.sequence > 1, self._halves(mesh))
        if self.exact and tokens <= SAMPLES[-1] or tokens in SAMPLES:
            return run(tokens)
        i = next((i for i, n in enumerate(SAMPLES) if n > tokens and i), len(SAMPLES) - 1)
        low, high = SAMPLES[i - 1], SAMPLES[i]
        (few, a), (many, b) = run(low), run(high)
        lines: dict[tuple[int, int], Footprint] = {}  # layers alike have one footprint
        for x, y in zip(few, many, strict=True):
            if (id(x), id(y)) not in lines:
                lines[id(x), id(y)] = between(tokens, low, x, high, y)
        return [lines[id(x), id(y)] for x, y in zip(few, many, strict=True)], between(tokens, low, a, high, b)

    def _run(
        self, tensor: int, expert: int, shared: bool, halves: bool, tokens: int
    ) -> tuple[list[Footprint], Footprint]:
        key = tensor, expert, shared, halves, tokens
        if key not in self._runs:
            device = self.device if expert == 1 else "cuda"  # rows that have travelled are not run in turn
            inputs = _first_half() if halves else None
            model = self._divided(tensor, expert)
            self._runs[key] = footprints(model, tokens, device=device, ranks=tensor, shared=shared, inputs=inputs)
        return self._runs[key]

    def _halves(self, mesh: Mesh) -> bool:
        """Says whether backward passes are taken in two."""
        return mesh.pipeline > 1 and self.config.parallel.pipeline_schedule in HALVES

    def _flying(self, layout: MemoryLayout, rank: int) -> list[tuple[float, float]]:
        """Micro-steps whose activations a pipeline rank holds at a time, over those of all its layers, and micro-steps
        of which it holds what half of a backward pass left."""
        if layout.cut is None:
            return [(1.0, 0.0)]
        name, sizes = self.config.parallel.pipeline_schedule, [len(layers) for layers in layout.cut.cuts]
        if name == "1f1b":
            return [(float(min(layout.micro_steps, layout.mesh.pipeline - rank)), 0.0)]
        order = orders(name, layout.mesh.pipeline, len(sizes), layout.micro_steps)[rank]
        own = sum(sizes[s] for s in layout.cut.stages(rank))
        return [(held / own, halved / own) for held, halved in sorted(in_flight(order, sizes))]

    def _update(self, mesh: Mesh) -> float:
        """The most that the optimizer makes in a step."""
        sharing = mesh.data * mesh.sequence, mesh.expert
        if sharing not in self._updates:
            optimizer = build_optimizer(self.config.optimizer.build(), self.build(), declarations(self.whole))
            made = getattr(optimizer, "temporaries", None)
            self._updates[sharing] = made(mesh, self.master, self.device) if made else 0.0
        return self._updates[sharing]

    def _sent(self, layout: MemoryLayout) -> float:
        """The most bytes of a message between the ranks of a sequence, and of what it is made of or goes into."""
        ranks, transport = layout.mesh.sequence, self.config.parallel.transport
        if ranks == 1:
            return 0.0
        most = 0.0
        for ask in dict.fromkeys(self.asks):
            if isinstance(ask, AttendCall) and ask.window is None:
                heads = 1 if transport.attention == "gather" else ask.kv_heads
                spans = ranks if transport.attention == "gather" else 2
                block = spans * layout.tokens * heads * ask.sent
                most = max(most, block * (ask.itemsize + max(4, ask.itemsize)))
            if isinstance(ask, ScanCall):
                most = max(most, 2.0 * ranks * (ask.decay + ask.state) * ask.itemsize)
        return most / layout.mesh.tensor


def _first_half() -> Inputs:
    """torch's first half of a backward pass, as `parallel.pipeline.stage` takes it."""
    from torch.distributed.pipelining._backward import stage_backward_input  # takes a second, and few ask for it

    return stage_backward_input


def _spread(model: LM, ranks: int) -> None:
    """Gives a model on the meta device the experts of one of so many ranks."""
    for moe in mixtures(model).values() if ranks > 1 else ():
        for name, weight in list(moe.experts.named_parameters(recurse=False)):
            part = torch.nn.Parameter(weight.detach()[: len(weight) // ranks])
            part.declared = weight.declared  # type: ignore[attr-defined]
            moe.experts.register_parameter(name, part)
        moe.experts.num_experts //= ranks


def _gathered(model: LM, master: torch.dtype) -> None:
    """Has a model's layers read codes of those weights that ranks gather in few bits."""
    for each in gathered_weights_of(model):
        weight = getattr(each.module, each.attribute)
        shape, scaling = as_matrix(weight.shape, each.scaling or Scaling(BF16, 0, 0, True))
        codes = torch.empty(shape, dtype=DTYPES[scaling.format], device="meta")
        scale = torch.empty(shares(torch.Size(shape), scaling), device="meta")
        coded = torch.nn.Parameter(CodedWeight(Codes(codes, scale, scaling), weight.shape, master))
        coded.declared = weight.declared  # type: ignore[attr-defined]
        each.module.register_parameter(each.attribute, coded)


def layout_of(config: RunConfig, model: LM, mesh: Mesh, plan: Any, device: str) -> MemoryLayout:
    """The layout of a run whose first step has this plan. model: on the meta device."""
    groups = [group for micro in plan.micro_steps for group in micro.groups]
    most = max(sum(end - begin for begin, end in spans) for group in groups for spans in group.spans)
    if (limit := config.train.span_tokens) is not None:
        most = min(most, limit)
    cut = None if mesh.pipeline == 1 else PipelineCut.of(model, cuts(config, model, device), mesh.pipeline)
    recompute = str(config.engine.get("recompute", "none"))
    return MemoryLayout(mesh=mesh, tokens=max(most, 1), micro_steps=len(plan.micro_steps), recompute=recompute, cut=cut)
