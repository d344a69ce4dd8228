"""The pipeline of a plan: its micro-steps run through the stages, each stage on ranks of its own.

Every rank of a pipeline places the same micro-steps, by the same plan, and sends to its neighbours what layers pass on.
So nothing about documents, positions or random choices is sent. The sums of a step are those of all stages together:
the cross-entropy arises on the last, the routers' losses where the routers are.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listed
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.lm import LM, Output
from models.sequence import Sequence
from parallel.collectives import LEDGER, Comm
from parallel.fsdp import communicate_gradients
from parallel.liveness import HERE, TIMEOUT, Wait
from parallel.mesh import Meshes
from parallel.pipeline.cut import PipelineCut
from parallel.pipeline.orders import HALVES, scheduled
from parallel.pipeline.stage import ACTIVATIONS, Objective, PipelineStage, reduce, whole_weights
from parallel.schedule.plan import Plan
from parallel.schedule.stages import check
from parallel.sequence.place import Placed

SHARED = "shared weights gradient"


class Pipeline:
    """Runs micro-steps through the stages of which this rank has some.

    model: what the cut has left of one for this rank. schedule: see `orders`. phase: a clock by the name of what
    is done. reshard_after_forward: as in FSDP. Opening
    it is collective over the whole world.
    """

    def __init__(
        self,
        model: LM,
        cut: PipelineCut,
        schedule: str,
        meshes: Meshes,
        *,
        phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
        reshard_after_forward: bool = True,
    ):
        self.model, self.cut, self.schedule, self.phase = model, cut, schedule, phase
        self.reshard_after_forward = reshard_after_forward
        self.comm = comm = meshes.comm("pipeline")
        self.shared = self._open(meshes)
        cuts = cut.cuts
        self.stages = [
            PipelineStage(model, cuts[s], s, len(cuts), comm, meshes.device, self._computing)
            for s in cut.stages(comm.rank)
        ]
        self._left = 0  # backward passes of this rank in the step
        self._waiting = ExitStack()

    def _open(self, meshes: Meshes) -> dict[str, Comm]:
        """The communicators of the parameters that this rank shares."""
        comms: dict[tuple[int, ...], Comm] = {}
        for held in sorted(set(self.cut.shared.values())):
            for line in meshes.mesh.groups("pipeline"):
                ranks = tuple(line[r] for r in held)
                group = dist.new_group(list(ranks), timeout=TIMEOUT)
                if line == self.comm.ranks and self.comm.rank in held:
                    comms[held] = Comm(ranks, held.index(self.comm.rank), group, self.comm.waiting)
                    LEDGER.axes[group.group_name] = "pipeline"
        return {name: comms[held] for name, held in self.cut.shared.items() if held in comms}

    def train(self, plan: Plan, placed: Listed[Placed], objective: Objective) -> list[Output]:
        """Forward and backward of all micro-steps: gradients add up in the model, and are reduced once. Returns what
        this rank's stages found. Raises ValueError for a plan that cannot run in a pipeline."""
        check(plan, self.schedule, self.comm.size)
        count, halves = len(placed), self.schedule in HALVES
        for stage in self.stages:
            stage.begin(placed, objective)
        self._left = count * len(self.stages)
        if halves:
            whole_weights(self.model)
        run = scheduled(self.schedule, self.stages, count)
        self._wait()
        try:
            run._step_microbatches([()] * count, [{}] * count, [None] * count, return_outputs=False)
        finally:
            self._waiting.close()
        if halves:
            reduce(self.model, reshard_after_forward=self.reshard_after_forward)
        self._sum_shared()
        return [output for stage in self.stages for output in stage.outputs.values()]

    def forward(self, tokens_BT: Tensor, seq: Sequence, targets_BT: Tensor) -> Output:
        """Returns what the last stage says of a micro-step, forward only; other ranks have no losses of tokens."""
        output: Output | None = None
        for stage in self.stages:
            stage.placed = (Placed(tokens_BT, targets_BT, seq),)
            arrived = None
            if not stage.is_first:
                like = stage.memory(0, stage.arriving)
                arrived = self.comm.receive(like, stage.neighbour(-1), purpose=ACTIVATIONS)
            passed, output = stage.run(0, arrived)
            if not stage.is_last:
                self.comm.send(passed, stage.neighbour(1), purpose=ACTIVATIONS).wait()
        assert output is not None
        return output

    def _sum_shared(self) -> None:
        """Gives each rank that holds a parameter the sum of the gradients of all that do."""
        for name, comm in self.shared.items():
            parameter = self.model.get_parameter(name)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad
            mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            mine.copy_(comm.all_reduce(mine, purpose=SHARED))

    @contextmanager
    def _computing(self, phase: str) -> Iterator[None]:
        """One computation of a schedule. All time between two of them is spent on messages of neighbours."""
        self._waiting.close()
        if phase == "backward":
            self._left -= 1
            if self.schedule not in HALVES:
                communicate_gradients(self.model, self._left == 0)
        with self.phase(phase):
            yield
        self._wait()

    def _wait(self) -> None:
        self._waiting.enter_context(self.comm.waiting())
        self._waiting.enter_context(HERE.waiting(Wait("", ACTIVATIONS, "receive", self.comm.ranks)))
