"""A stage of a pipeline, as torch's schedules call it: they say what is computed and sent when, a stage does it.

torch's own stage expects micro-batches of one shape, splits them itself, and takes its gradients from one loss at the
end. Here the micro-steps of a plan have lengths of their own, each has its `Sequence`, looked up by number, and an
inner stage has a loss, too: that of its routers. So a message is made when its micro-step is known, and a backward pass
starts from what was passed on, with the gradient that comes back, and from the stage's own part of the objective.

A message is one tensor, [1 + H, B, T, D]: `models.lm.LM.part`. With tensor ranks, each sends its share of the tokens to
its counterpart, [1, 1, C, D].

With FSDP, a backward pass in two halves needs weights that stay whole: torch's function for inputs looks for the
weights in the graph by identity, and would otherwise look for their shards (no error, no gradient).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.pipelining.stage import _PipelineStageBase

from models.lm import LM, Output
from parallel.collectives import LEDGER, Comm
from parallel.fsdp import communicate_gradients
from parallel.sequence.place import Placed
from parallel.tensor import division_of

ACTIVATIONS, GRADIENTS = "activations", "activations gradient"
Objective = Callable[[Output], Tensor]
Computing = Callable[[str], AbstractContextManager[None]]  # is entered for each "forward" and "backward"


class PipelineStage:
    """Some layers of a model on this rank. `comm`: this rank's pipeline.

    What a schedule reads: stage_index, num_stages, is_first, is_last, group_rank, group_size, the tables of its
    messages, and the methods below that torch's stages have, too.
    """

    has_backward = True
    submod = None  # a schedule gathers the weights of one that is a module: here that is left to FSDP's hooks

    def __init__(
        self,
        model: LM,
        layers: range,
        index: int,
        stages: int,
        comm: Comm,
        device: torch.device,
        computing: Computing,
    ):
        self.model, self.layers, self.comm, self.device, self.computing = model, layers, comm, device, computing
        self.stage_index, self.num_stages = index, stages
        self.group_rank, self.group_size, self.group = comm.rank, comm.size, comm.group
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.stage_index_to_group_rank: dict[int, int] = {}
        self.args_recv_info: dict[int, tuple[Any, ...]] = {0: ()}
        self.act_send_info: dict[int, list[Any]] = {}
        self.arriving, self.leaving = (model.passing(end) for end in (layers.start, layers.stop))
        self.placed: Sequence[Placed] = ()
        self.objective: Objective | None = None

    def begin(self, placed: Sequence[Placed], objective: Objective) -> None:
        """Readies it for the micro-steps of a step."""
        self.placed, self.objective = placed, objective
        self.entering: dict[int, Tensor] = {}
        self.passed: dict[int, Tensor] = {}
        self.losses: dict[int, Tensor] = {}
        self.returning: dict[int, Tensor] = {}
        self.back: dict[int, Tensor] = {}
        self.halves: dict[int, Any] = {}
        self.outputs: dict[int, Output] = {}

    def memory(self, m: int, tensors: int) -> Tensor:
        """An empty message of a micro-step."""
        rows, divided = tuple(self.placed[m].tokens.shape), division_of(self.model)
        if divided is not None:  # between layers a tensor rank has its share of the tokens
            rows = 1, -(-math.prod(rows) // divided.comm.size)
        shape = (tensors, *rows, self.model.dim)
        return torch.empty(shape, dtype=self.model.compute, device=self.device)

    def run(self, m: int, arrived: Tensor | None) -> tuple[Tensor, Output]:
        """Its layers on a micro-step: what it passes on, and what it found."""
        placed = self.placed[m]
        return self.model.part(self.layers, placed.tokens, placed.seq, placed.targets, arrived, placed.ahead)

    # torch's schedules call these.

    def forward_one_chunk(self, m: int, *_: Any, **__: Any) -> None:
        arrived = None if self.is_first else self.entering[m].requires_grad_()
        with self.computing("forward"):
            passed, output = self.run(m, arrived)
            if not self.is_last:
                self.passed[m] = passed
            assert self.objective is not None
            loss = self.objective(output)
            if loss.requires_grad:
                self.losses[m] = loss
            self.outputs[m] = detached(output)

    def backward_one_chunk(self, m: int, full_backward: bool = True, **_: Any) -> None:
        roots, gradients = list[Tensor](), list[Tensor]()
        if not self.is_last:
            roots.append(self.passed.pop(m))
            gradients.append(self.returning.pop(m))
        if (loss := self.losses.pop(m, None)) is not None:
            roots.append(loss)
            gradients.append(torch.ones_like(loss))
        arrived = self.entering.pop(m, None)
        with self.computing("backward"):
            if full_backward:
                torch.autograd.backward(roots, gradients)
            elif arrived is None:  # nobody waits for the gradient of tokens
                self.halves[m] = roots, gradients
            else:
                self.halves[m] = stage_backward_input(roots, gradients, [arrived], self.model.parameters())[1]
        if arrived is not None:
            gradient, arrived.grad = arrived.grad, None
            self.back[m] = torch.zeros_like(arrived) if gradient is None else gradient.contiguous()

    def backward_weight_one_chunk(self, m: int, **_: Any) -> None:
        half = self.halves.pop(m)
        with self.computing("backward"):
            if self.is_first:
                torch.autograd.backward(*half)
            else:
                stage_backward_weight(self.model.parameters(), half)

    def get_fwd_recv_ops(self, m: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        self.entering[m] = self.memory(m, self.arriving)
        return [self._op(dist.irecv, self.entering[m], -1, ACTIVATIONS)]

    def get_fwd_send_ops(self, m: int) -> list[dist.P2POp]:
        return [] if self.is_last else [self._op(dist.isend, self.passed[m].detach(), 1)]

    def get_bwd_recv_ops(self, m: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        self.returning[m] = self.memory(m, self.leaving)
        return [self._op(dist.irecv, self.returning[m], 1, GRADIENTS)]

    def get_bwd_send_ops(self, m: int) -> list[dist.P2POp]:
        return [] if self.is_first else [self._op(dist.isend, self.back.pop(m), -1)]

    def perform_reduce_grad(self, factor: int) -> None:
        """Left to FSDP's hooks, or to `reduce` once all stages are done."""

    def clear_runtime_states(self) -> None: ...

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []

    def _prepare_forward_infra(self, *_: Any, **__: Any) -> None: ...

    def _prepare_backward_infra(self, *_: Any, **__: Any) -> None: ...

    def neighbour(self, step: int) -> int:
        """The rank in the pipeline of the stage before (-1) or after (1)."""
        return (self.group_rank + step) % self.group_size

    def _op(self, function: Callable[..., Any], x: Tensor, step: int, received: str | None = None) -> dist.P2POp:
        if received is not None:
            LEDGER.add(self.comm.name, received, x.nbytes)
        return dist.P2POp(function, x, self.comm.ranks[self.neighbour(step)], self.group)


def detached(output: Output) -> Output:
    """Without its graph."""
    nats, ahead = (None if x is None else x.detach() for x in (output.cross_entropy, output.ahead))
    return output._replace(balance=output.balance.detach(), z=output.z.detach(), cross_entropy=nats, ahead=ahead)


def whole_weights(model: nn.Module) -> None:
    """FSDP gathers a layer's weights once a step, and reduces their gradients when it is told to."""
    if isinstance(model, FSDPModule):
        communicate_gradients(model, False)
        model.set_reshard_after_forward(False)
        model.set_reshard_after_backward(False)  # of all weights: halves of backward passes read them later


def reduce(model: nn.Module, *, reshard_after_forward: bool) -> None:
    """Reduces the gradients that have added up in whole weights, and shards both again."""
    if isinstance(model, FSDPModule):
        _PipelineStageBase.perform_reduce_grad(SimpleNamespace(submod=model), 1)  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(reshard_after_forward and module is not model, recurse=False)
