"""Traffic of a step on a mesh of any dimensions but pipeline: the model, run once on the meta device as each of the
tensor ranks, tells what it exchanges by token.

The counterpart of `train.metrics.comm_trace` for `models.width`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.axes import declarations
from models.kernels.low_precision import Scaling
from models.lm import LM
from models.precision import wide
from parallel.collectives import Comm
from parallel.schedule.comm_volume import GradientFormat, How, Traffic, of_plan, of_weights
from parallel.schedule.expert_volume import of_experts
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Plan
from parallel.schedule.tensor_volume import Kind, Shared, TensorCall, of_copies, of_partial, of_tensor
from parallel.tensor import HIDDEN, DividedWidth, division, replace_parameters
from parallel.tensor_loss import PURPOSE
from train.metrics.comm_trace import TOKENS, asked, expert_calls, expert_units, weight_units

ByAxis = dict[str, Traffic]  # of a rank, by the names of the ledger's axes


def of_step(
    build: Callable[[], LM],
    mesh: Mesh,
    plan: Plan,
    starts: Sequence[Sequence[int]],
    how: How,
    *,
    itemsize: int,
    reshard: bool,
    recompute: str,
    experts: str = "counted",
    device: str = "cpu",
    gradients: GradientFormat = "high",
    coded: Mapping[str, Scaling] | None = None,
) -> list[ByAxis]:
    """Returns what each rank receives in a step of training, by rank number. Nothing of pipeline ranks.

    build: a new model on the meta device, `compute` and `loss_chunk` set. starts: of each of the batch's sequences,
    where its documents begin. itemsize: bytes of a master weight. reshard, recompute: `engine.reshard_after_forward`,
    `engine.recompute`. experts: `parallel.transport.experts`. gradients, coded: as in `weight_units`. Raises
    ValueError for a model that cannot be divided, NotImplementedError for one whose course depends on data.
    """
    by_rank: list[ByAxis] = [{} for _ in range(mesh.world)]
    alike = mesh.data * mesh.sequence  # that hold the same experts
    sharded, steps = alike * mesh.expert, len(plan.micro_steps)
    together = max(len(group.ranks) for micro in plan.micro_steps for group in micro.groups)
    for tensor in range(mesh.tensor):
        model = build()
        noted, shared = divided(model, mesh.tensor, tensor)
        asks = asked(model, device=device) if together > 1 or mesh.tensor > 1 else ()
        options: dict[str, Any] = {"itemsize": itemsize, "reshard": reshard, "experts": mesh.expert}
        options["gradients"] = gradients
        units = weight_units(model, **options, coded=coded)
        apart = expert_units(model, **options, coded=coded) if mesh.expert > 1 else []
        rows = of_experts(plan, mesh, expert_calls(model), padded=experts == "padded", recompute=recompute)
        parts = of_partial(shared, sharded, itemsize)
        sequence = of_plan(plan, starts, asks, how, recompute=recompute)
        calls = step_calls(model, noted) if mesh.tensor > 1 else []
        inside = of_tensor(plan, calls, mesh.tensor, recompute=recompute)
        for rank in range(mesh.planned):
            traffic = by_rank[rank * mesh.tensor + tensor]
            traffic["sequence"] = sequence.get(rank, Traffic())
            traffic["world" if sharded == mesh.world else "dense"] = of_weights(units, sharded, steps)
            traffic["experts"], traffic["expert"] = of_weights(apart, alike, steps), rows[rank]
            traffic["replicate"] = of_copies(units, sharded, mesh.replicate)
            traffic["replicate"].include(of_copies(apart, alike, mesh.replicate))
            traffic["tensor"] = inside.get(rank, Traffic())
            traffic["tensor"].include(parts[rank % sharded])
    return by_rank


@dataclass(frozen=True)
class _Noting(Comm):
    """A communicator of shapes alone, which notes what passes. begins, ends: the number of
    calls when each layer began, and when it was done."""

    found: list[TensorCall] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def _note(self, kind: Kind, x: Tensor, purpose: str, tokens: int) -> None:
        self.found.append(TensorCall(kind, purpose, x.numel() // tokens, x.itemsize))

    def all_gather(self, x: Tensor, *, purpose: str) -> Tensor:
        self._note("gather", x, purpose, TOKENS // self.size)
        return x.new_empty(self.size, *x.shape)

    def reduce_scatter(self, x: Tensor, *, purpose: str) -> Tensor:
        self._note("scatter", x, purpose, TOKENS)
        return x.new_empty(x.shape[1:])

    def all_reduce(self, x: Tensor, *, purpose: str) -> Tensor:
        self._note("reduce", x, purpose, TOKENS)
        return torch.empty_like(x)


def divided(model: LM, ranks: int, rank: int) -> tuple[_Noting, list[Shared]]:
    """Gives a model on the meta device the shapes of one of `ranks` tensor ranks. Returns what notes its exchanges when
    it runs (`comm_trace.asked`), and the parameters of which several ranks hold the same.

    Raises ValueError as `parallel.tensor.division` does.
    """
    declared, comm = declarations(model), _Noting(tuple(range(ranks)), rank)
    if ranks == 1:
        return comm, []
    pieces = division(model, declared, ranks)
    replace_parameters(model, pieces, DividedWidth(comm))
    shared: dict[int, list[tuple[int, int]]] = {}
    for name, p in model.named_parameters():
        p.piece = pieces[name]  # type: ignore[attr-defined]
        shared.setdefault(pieces[name].copies, []).append((p.shape[0], p[0].numel()))
    for layer in (*model.layers.values(), *model.mtp.values()):
        layer.register_forward_pre_hook(lambda *passed: comm.begins.append(len(comm.found)))
        layer.register_forward_hook(lambda *passed: comm.ends.append(len(comm.found)))
    return comm, [Shared(copies, tuple(shapes)) for copies, shapes in shared.items()]


def step_calls(model: LM, noted: _Noting) -> list[TensorCall]:
    """The calls of a step of training, from those of a forward pass that ends in logits.

    What enters the head and what leaves the embedding is in no layer. What leaves a layer last is not sent again where
    the layer is computed again: nothing that its backward pass needs comes after, but for the norm that ends a module
    of multi-token prediction. Targets have a loss in place of logits.
    """
    calls = list(noted.found)
    inside = {i for begin, end in zip(noted.begins, noted.ends, strict=True) for i in range(begin, end)}
    outside = [i for i, call in enumerate(calls) if call.purpose == HIDDEN and i not in inside]
    for i in (*outside, *(end - 1 for end in noted.ends[: len(model.layers)])):
        calls[i] = replace(calls[i], in_layer=False)
    calls = [call for call in calls if call.purpose != "logits"]
    itemsize, chunk = wide(torch.empty(0, dtype=model.compute)).itemsize, model.loss_chunk or 1 << 62
    loss = TensorCall("gather", PURPOSE, 2, itemsize, graded=False, in_layer=False, chunk=chunk)
    return [*calls, *[loss] * (1 + model.mtp_layers)]
